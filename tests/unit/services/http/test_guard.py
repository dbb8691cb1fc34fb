"""What both servers refuse before their applications see it, and what they let through."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.errors import RequestError
from services.http.guard import LAUNCH_HEADER, LAUNCH_VARIABLE, OPEN_PATHS, Guard

KEY = "the-key"
PATHS = [*sorted(OPEN_PATHS), "/info", "/nowhere"]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]


async def answer(request: Request) -> JSONResponse:
    return JSONResponse({"seen": f"{request.method} {request.url.path}"})


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    read = len(await Request(scope, receive).body())
    await JSONResponse({"read": read})(scope, receive, send)


def asking(app: ASGIApp, **options: Any) -> httpx.AsyncClient:
    """A client of an application behind its guard."""
    guard = Guard(app, **{"key": None, "open_paths": OPEN_PATHS, "max_body_bytes": 100} | options)
    return httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://127.0.0.1:8101")


def client(key: str | None) -> httpx.AsyncClient:
    routes = [Route(path, answer, methods=["GET"]) for path in (*OPEN_PATHS, "/info")]
    routes += [Route("/act", answer, methods=["POST"])]
    guard = Guard(Starlette(routes=routes), key=key, open_paths=OPEN_PATHS, max_body_bytes=100)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://127.0.0.1:8101", headers=headers)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://127.0.0.1:8101", "null", "", "http://\xe9".encode()]
)
@pytest.mark.parametrize("key", [None, KEY])
async def test_web_pages_are_refused_on_every_path_and_with_every_key(key: str | None, origin: str | bytes) -> None:
    async with client(key) as http:
        for path in [*PATHS, "/act"]:
            for method in METHODS:
                response = await http.request(method, path, headers={"Origin": origin})
                assert response.status_code == 403, (method, path)
                assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["field"] == "Origin" and "not web pages" in response.json()["detail"]
        assert "access-control-allow-origin" not in response.headers
        assert (await http.post("/act")).status_code == 200


async def test_a_page_without_the_key_does_not_learn_whether_it_was_right() -> None:
    async with client(KEY) as http:
        for given in ("Bearer wrong", f"Bearer {KEY}"):
            response = await http.post("/act", headers={"Origin": "http://a", "Authorization": given})
            assert response.status_code == 403


@pytest.mark.parametrize("key", [None, KEY])
async def test_head_is_answered_where_load_balancers_look_and_nowhere_else(key: str | None) -> None:
    async with client(key) as http:
        for path in OPEN_PATHS:
            response = await http.head(path, headers={"Authorization": ""})
            assert response.status_code == 200
            assert response.headers["content-length"] == (await http.get(path)).headers["content-length"]
        assert (await http.head("/act")).status_code == 405
        assert (await http.head("/nowhere")).status_code == 404


@pytest.mark.parametrize(
    "given",
    [None, "", KEY, f"Bearer{KEY}", f"bearer {KEY}", f"Bearer  {KEY}", f"Bearer {KEY} ", f"Bearer {KEY}x", "Bearer "],
)
async def test_no_other_word_than_the_key_opens_a_path_that_is_not_open(given: str | None) -> None:
    async with client(KEY) as http:
        del http.headers["Authorization"]
        headers = {} if given is None else {"Authorization": given}
        for path in ("/info", "/nowhere", "/docs", "/healthy", "/health/x"):
            response = await http.get(path, headers=headers)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["title"] == "Unauthorized" and KEY not in response.json()["detail"]
        for path in OPEN_PATHS:
            assert (await http.get(path, headers=headers)).status_code == 200
        assert (await http.get("/info", headers={"Authorization": f"Bearer {KEY}"})).status_code == 200


async def test_a_body_that_is_larger_than_announced_is_cut_off_as_it_arrives() -> None:
    async def pieces(num: int) -> AsyncIterator[bytes]:
        for _ in range(num):
            yield b"x" * 20

    async with asking(count) as http:
        most = await http.post("/act", content=pieces(5))
        assert (most.status_code, most.json()) == (200, {"read": 100})
        response = await http.post("/act", content=pieces(6))
        assert (response.status_code, response.json()["title"]) == (413, "Body too large")
        assert "at most 100 bytes" in response.json()["detail"]


async def test_an_application_that_answers_an_overlong_body_in_its_own_way_is_not_heard() -> None:
    """FastAPI turns what reading a body raises into a 400."""

    async def hides(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
        except RequestError:
            await JSONResponse({"detail": "There was an error parsing the body"}, 400)(scope, receive, send)

    async def body() -> AsyncIterator[bytes]:
        yield b"x" * 101

    async with asking(hides) as http:
        response = await http.post("/act", content=body())
        assert (response.status_code, response.json()["title"]) == (413, "Body too large")


async def test_a_refusal_by_the_application_becomes_its_problem_document() -> None:
    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        raise RequestError(429, "Full", "64 wait already", field="sequences", retry_after_s=2.6)

    async with asking(refuses) as http:
        response = await http.get("/info", headers={"X-Request-ID": "abc-1"})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json() == {
        "type": "about:blank",
        "title": "Full",
        "status": 429,
        "detail": "64 wait already",
        "request_id": "abc-1",
        "field": "sequences",
    }


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("abc-1", True),
        ("A" * 128, True),
        ("a.b_c:d-e", True),
        ("A" * 129, False),
        ("", False),
        ("a b", False),
        ("a/b", False),
    ],
)
async def test_a_request_keeps_a_reasonable_name_and_else_gets_one(given: str, is_kept: bool) -> None:
    async with client(None) as http:
        name = (await http.get("/info", headers={"X-Request-ID": given})).headers["x-request-id"]
        assert (name == given) == is_kept
        assert is_kept or re.fullmatch("[0-9a-f]{32}", name)


async def test_every_request_is_reported_and_the_guards_own_refusals_as_well() -> None:
    answered: list[tuple[str, int]] = []
    refused: list[str] = []
    options: dict[str, Any] = {
        "key": KEY,
        "on_refused": lambda error: refused.append(error.title),
        "on_answered": lambda scope, status, seconds: answered.append((scope["path"], status)),
    }

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/bug":
            raise ZeroDivisionError
        await JSONResponse({})(scope, receive, send)

    async with asking(fails, **options) as http:
        http.headers["Authorization"] = f"Bearer {KEY}"
        await http.get("/info")
        await http.get("/info/")
        await http.get("/info", headers={"Authorization": ""})
        with pytest.raises(ZeroDivisionError):
            await http.get("/bug")
    assert answered == [("/info", 200), ("/info/", 404), ("/info", 401), ("/bug", 500)]
    assert refused == ["Not found", "Unauthorized"]


async def test_a_server_that_was_launched_repeats_the_word_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCH_VARIABLE, raising=False)
    async with client(KEY) as http:
        assert LAUNCH_HEADER not in (await http.get("/health")).headers
    monkeypatch.setenv(LAUNCH_VARIABLE, "word")
    async with client(KEY) as http:
        for path, authorization in (("/health", ""), ("/info", f"Bearer {KEY}"), ("/info", "")):
            response = await http.get(path, headers={"Authorization": authorization})
            assert response.headers[LAUNCH_HEADER] == "word"


async def nothing() -> Message:
    """Of a caller that sends nothing."""
    raise AssertionError("nobody asks it")


async def test_websockets_are_closed_and_the_lifespan_passed_on() -> None:
    seen: list[str] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def send(message: Message) -> None:
        sent.append(message)

    guard = Guard(app, key=KEY, open_paths=OPEN_PATHS, max_body_bytes=100)
    await guard({"type": "lifespan"}, nothing, send)
    await guard({"type": "websocket", "path": "/health", "headers": []}, nothing, send)
    assert seen == ["lifespan"] and sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_caller_that_does_not_take_its_answer_is_no_error_of_the_server(has_begun: bool) -> None:
    async def gives_up(scope: Scope, receive: Receive, send: Send) -> None:
        if has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ConnectionAbortedError("not taken in time")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    guard = Guard(gives_up, key=None, open_paths=OPEN_PATHS, max_body_bytes=100)
    scope = {"type": "http", "method": "GET", "path": "/info", "headers": []}
    with contextlib.nullcontext() if has_begun else pytest.raises(ConnectionAbortedError):
        await guard(scope, nothing, send)
    assert len(sent) == int(has_begun)  # no end of the answer: the server closes the connection


@pytest.mark.parametrize("length", ["101", "9" * 5000, "-1", "1e2", "\u0661"])
async def test_an_announced_length_that_is_too_large_or_none_is_refused(length: str) -> None:
    async with client(None) as http:
        response = await http.post("/act", content=b"", headers={"Content-Length": length.encode()})
        assert response.status_code == 413


async def test_a_slash_too_many_is_a_problem_document_and_no_redirect() -> None:
    async with client(KEY) as http:
        for method, path in (("POST", "/act/"), ("GET", "/info/"), ("GET", "/health/"), ("GET", "/ready///")):
            response = await http.request(method, path, content=b"{}")
            assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
            assert response.json()["detail"] == f"{path} is not a route; leave out the slash at its end"
            assert (await http.request(method, path, headers={"Authorization": ""})).status_code == 401


async def test_a_request_that_is_cancelled_is_told_that_the_server_ends() -> None:
    """uvicorn cancels what is open at its end, and would log a traceback for each."""
    begun, sent = asyncio.Event(), []

    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def send(message: Message) -> None:
        sent.append(message)

    guard = Guard(waits, key=None, open_paths=OPEN_PATHS, max_body_bytes=100)
    scope = {"type": "http", "method": "POST", "path": "/act", "headers": []}
    asking = asyncio.create_task(guard(scope, nothing, send))
    await begun.wait()
    asking.cancel()
    await asking
    assert sent[0]["status"] == 503 and b"Shutting down" in sent[1]["body"]
