"""The teacher as a real process: scored over TCP, ended by a real signal while it works."""

import asyncio
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from services.clients import TeacherClient
from tests.integration.processes import KEY, Server, server

pytestmark = pytest.mark.integration


@pytest.fixture
def teacher(models: dict[str, str], tmp_path: Path) -> Iterator[Server]:
    options = ("--teacher.model", models["llama"], "--teacher.max_body_mib", "1", "--teacher.tokens_per_forward", "256")
    with server("teacher", tmp_path / "log", *options) as running:
        yield running


def test_what_exceeds_the_servers_limits_arrives_in_pieces(teacher: Server) -> None:
    """1.3 MiB of JSON against a limit of 1 MiB: the real server refuses it unread, the real client cuts it."""
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(0, 261, 256).tolist(), 248) for _ in range(1400)]

    async def score() -> tuple[np.ndarray, np.ndarray]:
        async with TeacherClient([teacher.url], key=KEY) as client:
            await client.wait_ready(5.0)
            whole = await client.score(sequences, top_k=2)
            alone = await client.score(sequences[-1:], top_k=2)
        return whole.token_logprobs, alone.token_logprobs

    whole, alone = asyncio.run(score())
    assert len(whole) == 1400 * 8 and np.isfinite(whole).all()
    np.testing.assert_allclose(whole[-8:], alone, atol=1e-5)
    with teacher.client() as client:
        metrics = client.get("/metrics").text
    assert 'distillserve_teacher_rejected_total{reason="Body too large"} 1.0' in metrics


def test_sigterm_lets_accepted_work_finish_and_turns_new_work_away(teacher: Server) -> None:
    body = {"sequences": [{"token_ids": [65] * 256, "prompt_length": 1}] * 600, "top_k": 1}
    with teacher.client() as client, ThreadPoolExecutor(1) as pool:
        working = pool.submit(client.post, "/v1/teacher/logprobs", json=body)
        while "distillserve_teacher_pending_requests 1.0" not in client.get("/metrics").text:
            assert not working.done()
            time.sleep(0.01)
        teacher.process.send_signal(signal.SIGTERM)
        try:
            while (ready := httpx.get(f"{teacher.url}/ready")).status_code == 200:
                time.sleep(0.01)
        except httpx.TransportError as error:
            told = working.result(timeout=60)
            pytest.fail(f"{error!r}; accepted work: {told.status_code} {told.text[:300]}; {teacher.log.read_text()}")
        refused = client.post("/v1/teacher/logprobs", json={**body, "sequences": body["sequences"][:1]})  # type: ignore[index]
        alive = httpx.get(f"{teacher.url}/health").status_code
        assert not working.done(), "the machine is too fast for this test: give it more to score"
        answer = working.result(timeout=60)
    assert (ready.status_code, ready.json()["title"]) == (503, "Shutting down")
    assert (refused.status_code, int(refused.headers["retry-after"]) > 0, alive) == (503, True, 200)
    assert answer.status_code == 200
    assert [len(s["token_logprobs"]) for s in answer.json()["sequences"]] == [255] * 600
    assert teacher.process.wait(timeout=20) == 0
    assert "Traceback" not in teacher.log.read_text()
