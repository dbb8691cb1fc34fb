"""The teacher's queue and engine, seen through its API: turns, places, callers that leave, an engine that fails."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from services.errors import PROBLEM_MEDIA_TYPE
from services.teacher.jobs import ScoreItem
from tests.teacher_app import GOOD, score, serving


def hold(service: Any, seen: list[int] | None = None) -> threading.Event:
    """Make the engine wait in every forward pass for the event; the first tokens of what it scores go into `seen`."""
    release = threading.Event()
    really_forward = service.scorer.engine.forward

    def forward(items: list[ScoreItem]) -> None:
        release.wait()
        if seen is not None:
            seen.extend(item.sequence.token_ids[0] for item in items)
        really_forward(items)

    service.scorer.engine.forward = forward
    return release


@pytest.fixture
def folder(tiny_model_folder: Callable[[str], str]) -> str:
    return tiny_model_folder("qwen3")


async def test_a_full_queue_says_when_to_come_back(folder: str) -> None:
    async with serving(folder, max_pending_requests=1) as client:
        service = client.service
        release = hold(service)
        body = {"sequences": [GOOD], "top_k": 1}
        accepted = asyncio.create_task(score(client, body))
        while service.pending == 0:
            await asyncio.sleep(0)
        refused = await score(client, body)
        release.set()
        assert (await accepted).status_code == 200
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1


async def test_a_full_queue_does_not_read_the_body_it_refuses(folder: str) -> None:
    read: list[bytes] = []

    async def chunks() -> AsyncIterator[bytes]:
        read.append(b" ")
        yield read[0]

    async with serving(folder, max_pending_requests=1) as client:
        service = client.service
        with service.place():
            refused = await client.post("/v1/teacher/logprobs", content=chunks())
        assert refused.status_code == 429 and read == []
        assert (await score(client, {"sequences": [GOOD], "top_k": 1})).status_code == 200
        text = (await client.get("/metrics")).text
    assert 'distillserve_teacher_rejected_total{reason="Too many requests"} 1.0' in text
    assert 'distillserve_teacher_requests_total{route="/v1/teacher/logprobs",status="429"} 1.0' in text


async def test_a_caller_that_goes_away_in_its_body_frees_its_place(folder: str) -> None:
    async with serving(folder, max_pending_requests=1) as client:
        messages: list[Any] = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{", "more_body": True}]
        answered: list[Any] = []

        async def receive() -> Any:
            return messages.pop()

        async def send(message: Any) -> None:
            answered.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "query_string": b""}
        await client.guard({**scope, "path": "/v1/teacher/logprobs", "headers": headers}, receive, send)
        assert answered[0]["status"] == 499
        assert client.service.pending == 0


async def test_a_long_text_does_not_hold_up_health(folder: str) -> None:
    async with serving(folder) as client:
        service = client.service
        busy = threading.Event()
        service._reader.submit(busy.wait)  # stands for a tokenizer at work
        waiting = asyncio.create_task(score(client, {"sequences": [{"prompt": "a", "completion": "b"}], "top_k": 1}))
        while service.pending == 0:
            await asyncio.sleep(0)
        assert (await client.get("/health")).status_code == 200
        busy.set()
        assert (await waiting).status_code == 200


async def test_a_caller_that_goes_away_before_its_turn_is_not_scored(folder: str) -> None:
    async with serving(folder, max_pending_requests=2) as client:
        service = client.service
        scored: list[int] = []
        release = hold(service, scored)
        first = {"sequences": [{"token_ids": [8, 6], "prompt_length": 1}], "top_k": 1}
        in_front = asyncio.create_task(score(client, first))
        while service.scorer._window or service.scorer._waiting or service.pending == 0:
            await asyncio.sleep(0.01)
        body = json.dumps({"sequences": [GOOD], "top_k": 1}).encode()
        hang_up = asyncio.Event()
        messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await hang_up.wait()
            return {"type": "http.disconnect"}

        answered: list[Any] = []

        async def send(message: Any) -> None:
            answered.append(message)

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/teacher/logprobs",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        leaving = asyncio.create_task(client.guard(scope, receive, send))
        while not service.scorer._waiting:
            await asyncio.sleep(0.01)
        hang_up.set()
        await leaving
        next_one = asyncio.create_task(
            score(client, {"sequences": [{"token_ids": [9, 6], "prompt_length": 1}], "top_k": 1})
        )
        while len(service.scorer._waiting) < 2:
            await asyncio.sleep(0.01)
        release.set()
        assert (await next_one).status_code == (await in_front).status_code == 200
        text = (await client.get("/metrics")).text
    assert scored == [8, 9]
    assert answered[0]["status"] == 499 and "distillserve_teacher_pending_requests 0.0" in text


async def test_it_is_not_ready_before_the_model_is_loaded_and_while_it_drains(folder: str) -> None:
    async with serving(folder, wait=False) as client:
        early = await client.get("/ready")
        assert (early.status_code, early.json()["title"]) == (503, "Loading")
        assert (await client.get("/health")).status_code == 200
        while client.service.scorer is None:
            await asyncio.sleep(0.01)
        assert (await client.get("/ready")).status_code == 200
        client.service.draining = True
        assert (await client.get("/ready")).status_code == 503


async def test_an_engine_failure_is_a_problem_without_its_insides(folder: str) -> None:
    async with serving(folder) as client:
        client.service.scorer.engine.forward = lambda _: 1 / 0
        response = await score(client, {"sequences": [GOOD], "top_k": 1})
    assert response.status_code == 500 and response.headers["content-type"] == PROBLEM_MEDIA_TYPE
    assert "division" not in response.text


async def test_one_request_that_fails_leaves_the_engine_in_service(folder: str) -> None:
    async with serving(folder) as client:
        service = client.service
        really_forward = service.scorer.engine.forward

        def fail_on_seven(items: list[ScoreItem]) -> None:
            if any(7 in item.sequence.token_ids for item in items):
                raise IndexError("a bug")
            really_forward(items)

        service.scorer.engine.forward = fail_on_seven
        bad = {"sequences": [{"token_ids": [7, 6], "prompt_length": 1}], "top_k": 1}
        assert (await score(client, bad)).status_code == 500
        assert (await client.get("/health")).status_code == (await client.get("/ready")).status_code == 200
        assert (await score(client, {"sequences": [GOOD], "top_k": 1})).status_code == 200


async def test_a_dead_engine_says_so_and_fails_fast(folder: str) -> None:
    failures: list[Exception] = []
    async with serving(folder) as client:
        service = client.service
        service.on_failure = failures.append
        service.scorer.engine.forward = lambda _: 1 / 0
        body = {"sequences": [GOOD], "top_k": 1}
        assert (await score(client, body)).status_code == 500
        service.scorer.engine.forward = None  # nothing is asked of it any more
        for response in (await client.get("/health"), await client.get("/ready"), await score(client, body)):
            assert (response.status_code, response.json()["title"]) == (503, "Engine failed")
    assert [type(error) for error in failures] == [ZeroDivisionError]
