"""How an answer leaves: in pieces, at its caller's pace, for a bounded time, and with its place until the end."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from services.teacher.api.paced_response import PacedResponse
from tests.teacher_app import serving


async def never() -> Any:
    await asyncio.Event().wait()


async def test_a_large_answer_goes_out_in_pieces() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    content = bytes(range(256)) * 2560  # 640 KiB: two pieces and a half
    await PacedResponse(content, "a/b", 1.0)({}, never, send)
    start, *bodies = sent
    assert (b"content-length", b"655360") in start["headers"] and (b"content-type", b"a/b") in start["headers"]
    assert [len(message["body"]) for message in bodies] == [262144, 262144, 131072, 0]
    assert b"".join(message["body"] for message in bodies) == content
    assert [message["more_body"] for message in bodies] == [True, True, True, False]


async def test_a_caller_who_does_not_take_its_answer_is_left() -> None:
    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    with pytest.raises(ConnectionAbortedError, match=r"did not take its answer within 0.05 s \(transfer_timeout_s\)"):
        await PacedResponse(b"x", "a/b", 0.05)({}, never, send)


async def test_the_place_is_kept_until_the_answer_is_sent(tiny_model_folder: Callable[[str], str]) -> None:
    """Else answers that nobody reads would pile up outside the bound on accepted requests."""
    async with serving(tiny_model_folder("qwen3")) as client:
        service = client.service
        body = json.dumps({"sequences": [{"token_ids": [5] * 200, "prompt_length": 1}] * 10, "top_k": 200}).encode()
        messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
        held: list[int] = []

        async def receive() -> Any:
            return messages.pop() if messages else await never()

        async def send(message: Any) -> None:
            if message.get("body"):
                held.append(service.pending)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "query_string": b""}
        await client.guard({**scope, "path": "/v1/teacher/logprobs", "headers": headers}, receive, send)
        assert len(held) > 10 and set(held) == {1} and service.pending == 0
