"""The teacher as a real process: scored over TCP, ended by a real signal while it works."""

import asyncio
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from services.clients import TeacherClient
from services.config import RunConfig
from tests.integration.processes import KEY, Server, server
from tests.models import save_model
from tests.unit.trainer.test_preflight import EOS, Servers, rollout_info
from tests.unit.trainer.test_teacher_faults import ROLLOUTS
from trainer import preflight
from trainer.rollouts import Rollout
from trainer.teacher_scores import score_rollouts
from trainer.tiny_pair import build_tokenizer

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


async def test_each_of_two_teachers_scores_the_rollouts_of_its_own_rows(teacher: Server, tmp_path: Path) -> None:
    """Through the preflight, against what either says when it is asked alone; their weights differ."""
    rollouts = [
        Rollout(replace(r.prompt, teacher="maths" if i % 3 else None), r.completion) for i, r in enumerate(ROLLOUTS)
    ]
    config, tokenizer = RunConfig(), build_tokenizer()
    with server(
        "teacher", tmp_path / "maths.log", "--teacher.model", save_model(tmp_path / "m", "llama", seed=7)
    ) as other:
        async with TeacherClient([teacher.url], key=KEY) as own, TeacherClient([other.url], key=KEY) as maths:
            clients = {None: own, "maths": maths}
            infos, teachers = await preflight.attach(config, Servers(rollout_info()), clients)  # type: ignore[arg-type]
            await preflight.check_teachers(config, tokenizer, EOS, teachers)
            support = preflight.choose_support(config.loss, len(tokenizer), infos, teachers)
            samples, quarantined = await score_rollouts(teachers, rollouts, support=support, temperature=0.7)
            sequences = [(r.sequence, len(r.prompt.token_ids)) for r in rollouts]
            alone = {n: await c.score(sequences, top_k=support.size, temperature=0.7) for n, c in clients.items()}
    assert [s.rollout for s in samples] == rollouts and quarantined == []
    assert np.abs(alone[None].token_logprobs - alone["maths"].token_logprobs).max() > 0.1
    for index, sample in enumerate(samples):
        scores = alone[sample.rollout.prompt.teacher]
        rows = slice(scores.row_offsets[index], scores.row_offsets[index + 1])
        np.testing.assert_allclose(sample.teacher_token_logprobs, scores.token_logprobs[rows], atol=1e-5)
        np.testing.assert_allclose(sample.teacher_support_logprobs, scores.topk_logprobs[rows], atol=1e-5)
        np.testing.assert_allclose(sample.teacher_tail_logprobs, scores.tail_logprobs[rows], atol=1e-5)
