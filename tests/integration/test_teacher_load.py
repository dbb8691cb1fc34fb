"""The real teacher with more callers than it takes, and with callers that go away."""

import asyncio
import json
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from services.config import TeacherConfig
from services.teacher.jobs import EncodedSequence
from services.teacher.transformers.engine import TransformersEngine
from services.wire.teacher import TeacherScores
from tests.integration.processes import KEY, Engine, Server, server, wait_until
from tests.integration.raw_http import JSON, connection, head
from tests.scoring import score_alone

pytestmark = [pytest.mark.integration, pytest.mark.alone]

NUM_CLIENTS = 200
FLOOD_S = 4.0
# Twenty requests of 20 sequences of 100 tokens, of which ten are scored: long to compute, short to send.
REQUESTS = np.random.default_rng(0).integers(0, 256, (20, 20, 100)).tolist()


def body_of(number: int) -> dict[str, object]:
    """The request of client `number`."""
    sequences = REQUESTS[number % len(REQUESTS)]
    return {"sequences": [{"token_ids": ids, "prompt_length": 90} for ids in sequences], "top_k": 1}


def direct_scores(model: str) -> list[TeacherScores]:
    """What the engine says to each of the requests, alone."""
    engine = TransformersEngine(TeacherConfig(model=model, device="cpu"))
    return [
        score_alone(engine, [EncodedSequence(ids, 90) for ids in sequences], top_k=1, temperature=1.0)
        for sequences in REQUESTS
    ]


def test_a_flood_is_turned_away_and_whoever_is_let_in_is_answered_right(
    teacher_server: Server, models: dict[str, str]
) -> None:
    expected = direct_scores(models["qwen3"])
    statuses: Counter[int] = Counter()
    pending: list[float] = []

    async def client(http: httpx.AsyncClient, number: int, until: float) -> None:
        while time.monotonic() < until:
            response = await http.post("/v1/teacher/logprobs", json=body_of(number))
            statuses[response.status_code] += 1
            if response.status_code == 200:
                found = [x for s in response.json()["sequences"] for x in s["token_logprobs"]]
                np.testing.assert_allclose(found, expected[number % len(expected)].token_logprobs, atol=1e-5)
            else:
                assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
                assert response.headers["content-type"] == "application/problem+json"
                await asyncio.sleep(0.1)  # a second and more was asked for

    async def watch(http: httpx.AsyncClient) -> None:
        while True:
            text = (await http.get("/metrics")).text
            pending.append(float(text.split("\ndistillserve_teacher_pending_requests ")[1].split()[0]))
            await asyncio.sleep(0.1)

    async def flood(seconds: float) -> None:
        limits = httpx.Limits(max_connections=None)
        options: dict[str, Any] = {"headers": {"Authorization": f"Bearer {KEY}"}, "timeout": 30.0, "limits": limits}
        async with httpx.AsyncClient(base_url=teacher_server.url, trust_env=False, **options) as http:
            watching = asyncio.create_task(watch(http))
            async with asyncio.TaskGroup() as group:
                for number in range(NUM_CLIENTS):
                    group.create_task(client(http, number, time.monotonic() + seconds))
            watching.cancel()

    asyncio.run(flood(1.0))  # what is allocated once
    before = teacher_server.memory_mib()
    asyncio.run(flood(FLOOD_S))
    grown = teacher_server.memory_mib() - before
    print(f"answers: {dict(statuses)}; most pending: {max(pending):.0f}; memory: {before:.0f} MiB, {grown:+.1f}")
    assert set(statuses) == {200, 429} and min(statuses.values()) >= 20
    assert 1 < max(pending) <= 16 and grown < 32
    assert teacher_server.metric("pending_requests") == 0


# ------------------------------------------------------------------------------------ callers that go away


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


@pytest.fixture
def roomy(models: dict[str, str], tmp_path: Path, engine: Engine) -> Iterator[Server]:
    """A teacher of many places; a request of LONG is a forward pass of its own."""
    options = ("--teacher.max_pending_requests", "128", "--teacher.tokens_per_forward", "256")
    with server("teacher", tmp_path / "log", "--teacher.model", models["qwen3"], *options, engine=engine) as running:
        yield running


LONG = json.dumps({"sequences": [{"token_ids": [65] * 200, "prompt_length": 1}], "top_k": 1}).encode()


def test_of_a_hundred_callers_that_hang_up_nothing_is_left(roomy: Server, engine: Engine) -> None:
    """A few are being scored, the others of 66 wait, 34 have sent half of their body; every other one resets its connection."""
    with roomy.client() as client:
        expected = client.post("/v1/teacher/logprobs", content=LONG, headers=JSON).json()
    engine.hold()
    announced = head(content_type="application/json", content_length=len(LONG))
    with ExitStack() as callers:
        for number in range(100):
            sock = callers.enter_context(connection(roomy))
            sock.sendall(announced + (LONG if number < 66 else LONG[:100]))
            if number % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        engine.wait_held()
        wait_until(lambda: roomy.metric("pending_requests") == 100)
    wait_until(lambda: roomy.metric("pending_requests") == 0)  # at once: the engine has not moved
    engine.release()
    with roomy.client() as client:
        assert client.post("/v1/teacher/logprobs", content=LONG, headers=JSON).json() == expected
    assert roomy.metric("queued_sequences") == roomy.metric("pending_requests") == 0
    # The first, those that were under way (one to four, by the machine's cores), and the last.
    assert 3 <= roomy.metric("forward_seconds_count") <= 6
    with roomy.client() as client:
        metrics = client.get("/metrics").text
    assert 'distillserve_teacher_requests_total{route="/v1/teacher/logprobs",status="499"} 100.0' in metrics
    assert "Traceback" not in roomy.log.read_text()
