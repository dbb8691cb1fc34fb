"""What both servers refuse before their applications see it, and what they let through."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from services.http.guard import OPEN_PATHS, Guard

KEY = "the-key"
PATHS = [*sorted(OPEN_PATHS), "/info", "/nowhere"]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]


async def answer(request: Request) -> JSONResponse:
    return JSONResponse({"seen": f"{request.method} {request.url.path}"})


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
    asking = asyncio.create_task(guard(scope, None, send))  # type: ignore[arg-type]
    await begun.wait()
    asking.cancel()
    await asking
    assert sent[0]["status"] == 503 and b"Shutting down" in sent[1]["body"]
