"""What the rollout server owes its callers while it works, and what it does with those that misbehave."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from services.clients import RolloutClient
from services.errors import ProblemError, RequestError
from services.http.bounded_connection import BoundedConnection
from services.rollout import completions
from services.rollout.body import parse_request, read_request
from services.rollout.settings import RolloutSettings
from services.wire.rollout import MAX_IDS_PER_REQUEST, RolloutSampling
from tests.rollout_app import LIMITS, SlowEngine, serving

SAMPLING = RolloutSampling(max_new_tokens=8)
BODY = {"prompts": [[5], [6]], "sampling": {"max_new_tokens": 8}}


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def request(content: bytes, **headers: object) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(["POST /v1/rollouts HTTP/1.1", "host: x", *lines, "", ""]).encode() + content


async def test_completions_may_take_longer_than_the_client_waits_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it waits for is silence."""
    monkeypatch.setattr(completions, "HEARTBEAT_S", 0.1)
    engine = SlowEngine(seconds=1.5)
    async with serving(engine) as server, RolloutClient([server.url], timeout_s=0.5, outage_s=0.0) as client:
        got = await client.generate([[5], [6]], SAMPLING, samples_per_prompt=2)
    assert [c.token_ids.tolist() for c in got] == [[5], [5], [6], [6]] and engine.aborted == set()


async def test_the_gate_may_be_closed_for_longer_than_the_client_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "HEARTBEAT_S", 0.1)
    async with serving(SlowEngine()) as server, RolloutClient([server.url], timeout_s=0.5, outage_s=0.0) as client:
        await server.state.admission.close(1.0)
        asking = asyncio.create_task(client.generate([[5]], SAMPLING))
        await asyncio.sleep(1.0)
        assert not asking.done()
        server.state.admission.open()
        assert len(await asking) == 1


async def test_an_engine_that_fails_is_told_in_the_stream() -> None:
    class Broken(SlowEngine):
        async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
            raise ValueError("no engine")
            yield

    async with serving(Broken()) as server, RolloutClient([server.url], outage_s=0.0) as client:
        with pytest.raises(Exception, match="ValueError: no engine"):
            await client.generate([[5]], SAMPLING)
        await until(lambda: server.state.places.taken == 0)


async def test_who_hangs_up_leaves_nothing_behind() -> None:
    engine = SlowEngine(seconds=60)
    async with serving(engine) as server:
        content = json.dumps(BODY).encode()
        _, writer = await asyncio.open_connection(*server.address)
        writer.write(request(content, content_length=len(content)))
        await until(lambda: len(engine.running) == 2 and server.state.places.taken == 1)
        writer.close()
        await until(lambda: len(engine.aborted) == 2 and server.state.places.taken == 0)
        assert server.state.admission.in_flight == 0


async def test_who_does_not_read_leaves_nothing_behind() -> None:
    """Two completions of 12 MB, which no buffer between the two holds, and two that are still computed."""

    class Impatient(BoundedConnection):
        transfer_timeout_s = 0.5

    engine: Any = SlowEngine(num_tokens=50_000)

    async def generate(prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        engine.seconds = 0.0 if prompt["prompt_token_ids"] == [5] else 60.0
        async for output in SlowEngine.generate(engine, prompt, params, request_id):
            yield output

    engine.generate = generate
    async with serving(engine, Impatient) as server:
        content = json.dumps({**BODY, "samples_per_prompt": 2, "student_top_k": 31}).encode()
        _, writer = await asyncio.open_connection(*server.address, limit=1024)
        writer.write(request(content, content_length=len(content)))
        await until(lambda: server.state.places.taken == 1)
        await until(lambda: len(engine.aborted) == 2 and server.state.places.taken == 0)
        await until(lambda: not server.server.server_state.connections)
        writer.close()


async def test_a_place_is_taken_before_the_body_is_read_and_late_bodies_give_it_back() -> None:
    async with serving(SlowEngine(), max_pending_requests=1, transfer_timeout_s=0.5) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(request(b'{"prompts"', content_length=100))
        await until(lambda: server.state.places.taken == 1)
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            refused = await client.post("/v1/rollouts", json=BODY)
            assert (refused.status_code, refused.json()["title"]) == (429, "Too many requests")
            assert int(refused.headers["retry-after"]) > 0
            assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
            assert (await client.post("/v1/rollouts", json=BODY)).status_code == 200
        writer.close()


async def test_a_client_that_finds_no_place_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "_RETRY_AFTER_S", 1.0)
    async with serving(SlowEngine(seconds=0.5), max_pending_requests=1) as server:
        first, second = RolloutClient([server.url]), RolloutClient([server.url])
        one = asyncio.create_task(first.generate([[5]], SAMPLING))
        await until(lambda: server.state.places.taken == 1)
        assert len(await second.generate([[6]], SAMPLING)) == len(await one) == 1
        await first.close()
        await second.close()


SETTINGS = RolloutSettings("m", "gloo", **LIMITS)
SENSELESS: dict[str, bytes] = {
    "ids without end": b"1," * (32 << 20),
    "ids without end in a prompt": b'{"prompts": [[' + b"1," * (32 << 20),
    "lists without end": b'{"prompts": [' + b"[" * (64 << 20),
    "objects without end": b'{"prompts": [' + b"{}," * (16 << 20),
    "names without end": b'{"a":1' + b',"a":1' * (1 << 18),
}


@pytest.mark.parametrize("which", SENSELESS)
def test_what_would_take_long_to_read_is_not_read(which: str) -> None:
    body = SENSELESS[which]
    started = time.thread_time()
    with pytest.raises(RequestError) as caught:
        parse_request(body, SETTINGS, 1 << 20, 1 << 18)
    assert (caught.value.status, caught.value.field) == (413, "prompts")
    assert time.thread_time() - started < 0.25


def test_the_largest_request_of_a_client_is_read() -> None:
    body = {"prompts": [[1] * (MAX_IDS_PER_REQUEST // 8192)] * 8192, "sampling": {"max_new_tokens": 4}}
    assert len(parse_request(json.dumps(body).encode(), SETTINGS, 1 << 20, 1 << 18).prompts) == 8192


async def test_large_bodies_keep_nobody_waiting() -> None:
    body = json.dumps({"prompts": [[123456] * 2048] * 500, "sampling": {"max_new_tokens": 4}}).encode()
    reading = asyncio.create_task(read_request(body, SETTINGS, 1 << 20, 1 << 18))
    num_turns = 0
    while not reading.done():
        await asyncio.sleep(0.001)
        num_turns += 1
    assert num_turns > 3 and len(reading.result().prompts) == 500


async def test_a_request_over_a_limit_is_told_so() -> None:
    async with serving(SlowEngine(), max_completions_per_request=1) as server:
        client = RolloutClient([server.url])
        with pytest.raises(ProblemError, match="above max_completions_per_request = 1"):
            await client.generate_on(server.url, [[5], [6]], SAMPLING)
        await client.close()
