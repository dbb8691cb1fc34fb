"""The teacher as a real process: scored over TCP, ended by real signals and by its engine while it works."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from services.clients import TeacherClient
from services.errors import PROBLEM_MEDIA_TYPE
from tests.integration.processes import KEY, Engine, Server, server, wait_until

pytestmark = pytest.mark.integration

BODY = {"sequences": [{"token_ids": [65] * 20, "prompt_length": 1}], "top_k": 1}


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


@pytest.fixture
def teacher(models: dict[str, str], tmp_path: Path, engine: Engine) -> Iterator[Server]:
    options = ("--teacher.model", models["llama"], "--teacher.max_body_mib", "1", "--teacher.tokens_per_forward", "256")
    with server("teacher", tmp_path / "log", *options, engine=engine) as running:
        yield running


@contextmanager
def held_requests(teacher: Server, engine: Engine, count: int) -> Iterator[list["Future[httpx.Response]"]]:
    """Requests of which one is being scored, and the others wait for it."""
    engine.hold()
    with teacher.client() as client, ThreadPoolExecutor(count) as pool:
        requests = [pool.submit(client.post, "/v1/teacher/logprobs", json=BODY) for _ in range(count)]
        engine.wait_held()
        wait_until(lambda: teacher.metric("pending_requests") == count)
        yield requests


def ready(teacher: Server) -> httpx.Response:
    return httpx.get(f"{teacher.url}/ready", trust_env=False)


def refuses_connections(teacher: Server) -> bool:
    try:
        ready(teacher)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # it was accepted, and closed
        return False
    return False


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_accepted_work_finish_and_turns_new_work_away(
    number: signal.Signals, code: int, teacher: Server, engine: Engine
) -> None:
    with held_requests(teacher, engine, 5) as working, teacher.client() as client:
        teacher.process.send_signal(number)
        wait_until(lambda: ready(teacher).status_code != 200)
        told = ready(teacher)
        refused = client.post("/v1/teacher/logprobs", json=BODY)
        alive = httpx.get(f"{teacher.url}/health", trust_env=False).status_code
        assert not any(request.done() for request in working)
        engine.release()
        answers = [request.result(timeout=60) for request in working]
    assert (told.status_code, told.json()["title"]) == (503, "Shutting down")
    assert (refused.status_code, int(refused.headers["retry-after"]) > 0, alive) == (503, True, 200)
    assert [answer.status_code for answer in answers] == [200] * 5
    assert [len(answer.json()["sequences"][0]["token_logprobs"]) for answer in answers] == [19] * 5
    assert teacher.process.wait(timeout=20) == code
    assert "Traceback" not in teacher.log.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_second_signal_closes_the_port_at_once_and_accepted_work_still_finishes(
    number: signal.Signals, code: int, teacher: Server, engine: Engine
) -> None:
    with held_requests(teacher, engine, 2) as working:
        teacher.process.send_signal(number)
        wait_until(lambda: ready(teacher).status_code == 503)
        teacher.process.send_signal(number)
        wait_until(lambda: refuses_connections(teacher))
        assert not any(request.done() for request in working)
        engine.release()
        assert [request.result(timeout=60).status_code for request in working] == [200, 200]
    assert teacher.process.wait(timeout=20) == code
    assert "Traceback" not in teacher.log.read_text()


def test_an_engine_that_dies_ends_the_process_and_whoever_waits_is_told(teacher: Server, engine: Engine) -> None:
    with held_requests(teacher, engine, 5) as working:
        engine.break_()
        engine.release()
        answers = [request.result(timeout=10) for request in working]
    # A server that ends may close its port before it is asked; if it answers, then as what it is.
    for path in ("/health", "/ready"):
        with suppress(httpx.TransportError):
            assert httpx.get(f"{teacher.url}{path}", trust_env=False).status_code == 503
    assert sorted(answer.status_code for answer in answers) == [500, 503, 503, 503, 503]
    for answer in answers:
        assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE and "bus" not in answer.text
    assert teacher.process.wait(timeout=20) == 1
    last_line = teacher.log.read_text().splitlines()[-1]
    assert last_line == "distillserve: the teacher's engine failed: RuntimeError: the device fell off the bus"


def test_a_teacher_that_is_stopped_for_a_while_is_asked_again(
    teacher: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGSTOP: connections are accepted by the kernel and nobody answers, as with a machine that swaps."""
    caplog.set_level("INFO", logger="services.clients.replicas")
    sequences = [([60, 61, i], 1) for i in range(100)]
    expected = score_in_time(teacher, sequences)
    os.kill(teacher.process.pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(score_in_time, teacher, sequences)
            wait_until(lambda: "is left alone" in caplog.text)  # after three timeouts in a row
            assert not waiting.done()
            os.kill(teacher.process.pid, signal.SIGCONT)
            answer = waiting.result(timeout=60)
    finally:
        os.kill(teacher.process.pid, signal.SIGCONT)
    np.testing.assert_allclose(answer, expected, atol=1e-5)
    assert "is back" in caplog.text
    wait_until(lambda: teacher.metric("pending_requests") == 0)  # of those that nobody waited for
    assert "Traceback" not in teacher.log.read_text()


def score_in_time(teacher: Server, sequences: list[Any]) -> np.ndarray:
    async def score() -> np.ndarray:
        async with TeacherClient([teacher.url], key=KEY, timeout_s=0.5, outage_s=30.0) as client:
            return (await client.score(sequences, top_k=2, max_rows_per_request=20)).token_logprobs

    return asyncio.run(score())


def test_the_log_is_json_where_that_is_asked_for(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLSERVE_LOG_FORMAT", "json")
    with (
        server("teacher", tmp_path / "log", "--teacher.model", models["llama"]) as running,
        running.client() as client,
    ):
        body = {"sequences": [{"token_ids": [5, 6, 7], "prompt_length": 1}], "top_k": 0}
        refused = client.post("/v1/teacher/logprobs", json=body, headers={"X-Request-ID": "mine-7"})
    assert (refused.status_code, refused.json()["request_id"]) == (422, "mine-7")
    (line,) = [line for line in running.log.read_text().splitlines() if "mine-7" in line]
    said = json.loads(line)
    assert (said["request_id"], said["status"], said["path"]) == ("mine-7", 422, "/v1/teacher/logprobs")
    assert said["logger"] == "services.teacher.api.answer_log" and KEY not in running.log.read_text()
