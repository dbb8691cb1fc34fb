"""ASGI pieces that both servers wear on the outside: request id, body limit, key, and one shape for errors.

Pure ASGI, so that the rollout server can put it around vLLM's application.
"""

import asyncio
import hmac
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Collection

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import logs
from services.errors import PROBLEM_MEDIA_TYPE, RequestError, problem_document

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What either server answers without a key."""

LAUNCH_HEADER = "x-distillserve-launch"
LAUNCH_VARIABLE = "DISTILLSERVE_LAUNCH"
"""By what `distillserve up` knows its own servers from strangers that answer on the port: they repeat what it gave them."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """Lets a request through to `app`, or answers it with a problem document.

    Args:
        app: the application behind.
        key: required as `Authorization: Bearer KEY` on every path but `open_paths`; None lets every program in.
        open_paths: health and readiness; they also answer HEAD.
        max_body_bytes: larger bodies are refused, by their announced length or while they arrive.
        on_refused: told of every refusal of its own, for metrics.
        on_answered: told of every request's scope, status and duration in seconds, for metrics and logs.

    A web page that somebody has open can send to the loopback of his machine. Browsers name the page in an Origin header
    (of all that is not a plain read), so whatever has one is refused, before its key is looked at and on every path.

    A RequestError that `app` raises before it has answered becomes the problem document it describes; a
    ConnectionAbortedError that it raises in the middle of its answer closes the connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        open_paths: Collection[str],
        max_body_bytes: int,
        on_refused: Callable[[RequestError], None] | None = None,
        on_answered: Callable[[Scope, int, float], None] | None = None,
    ) -> None:
        self._app = app
        self._on_refused, self._on_answered = on_refused, on_answered
        self._key = key.encode() if key else None
        self._open_paths = frozenset(open_paths)
        self._max_body_bytes = max_body_bytes
        launch = os.environ.get(LAUNCH_VARIABLE)
        self._headers = [(LAUNCH_HEADER.encode(), launch.encode())] if launch else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # neither server has a websocket route
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["method"] == "HEAD" and scope["path"] in self._open_paths:
            scope = {**scope, "method": "GET"}  # uvicorn sends no body after a HEAD, whatever the application answers
        logs.request_id.set(_request_id(scope))
        started = time.monotonic()
        exchange = _Exchange(scope, receive, send, self._max_body_bytes, self._headers)
        try:
            await self._answer(scope, receive, exchange)
        finally:
            if self._on_answered is not None:
                self._on_answered(scope, exchange.status, time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, exchange: "_Exchange") -> None:
        try:
            _check_origin(scope)
            self._check_key(scope)
            _check_slash(scope)
            exchange.check_announced()
            await self._app(scope, exchange.receive, exchange.send)
        except RequestError as error:
            if exchange.answered:
                raise
            if self._on_refused is not None:
                self._on_refused(error)
            await problem_response(error)(scope, receive, exchange.send)
        except asyncio.CancelledError:  # by uvicorn, which ends and waits no longer
            if not exchange.answered:
                refusal = RequestError(
                    503, "Shutting down", "the server ends; ask again once it is started", retry_after_s=5
                )
                await problem_response(refusal)(scope, receive, exchange.send)
        except ConnectionAbortedError:
            if not exchange.answered:
                raise
            # The caller does not take its answer; the server closes a connection whose answer is not complete.

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in self._open_paths:
            return
        given = _header(scope, b"authorization") or b""
        if not hmac.compare_digest(given, b"Bearer " + self._key):
            raise RequestError(401, "Unauthorized", "a valid key is required: send `Authorization: Bearer KEY`")


def _check_origin(scope: Scope) -> None:
    if (origin := _header(scope, b"origin")) is not None:
        page = origin.decode("ascii", errors="replace")[:100]
        raise RequestError(
            403,
            "Web pages are refused",
            f"this server answers programs, not web pages (Origin: {page!r})",
            field="Origin",
        )


def _check_slash(scope: Scope) -> None:
    """FastAPI would redirect, and a client that follows sends neither body nor key."""
    path = scope["path"]
    if path != "/" and path.endswith("/"):
        raise RequestError(404, "Not found", f"{path} is not a route; leave out the slash at its end")


class _Exchange:
    """One request and its answer: counts what comes in, adds the request id to what goes out."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int, headers: list[tuple[bytes, bytes]]
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._max_body_bytes, self._headers = max_body_bytes, headers
        self._received = 0
        self._overrun: RequestError | None = None
        self.answered = False
        self.status = 500  # what an exception becomes further out

    def check_announced(self) -> None:
        announced = _header(self._scope, b"content-length") or b"0"
        # Python makes no number of thousands of digits.
        if not announced.isdigit() or len(announced) > 20 or int(announced) > self._max_body_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._max_body_bytes:
            self._overrun = self._too_large()
            raise self._overrun
        return message

    async def send(self, message: Message) -> None:
        if self._overrun is not None:
            # FastAPI turns what `receive` raised into a 400 of its own; the caller shall learn the reason.
            overrun, self._overrun = self._overrun, None
            await problem_response(overrun)(self._scope, self._receive, self.send)
            self._send = _discard
            return
        if message["type"] == "http.response.start":
            self.answered, self.status = True, message["status"]
            headers = [*message.get("headers", []), *self._headers, (b"x-request-id", logs.request_id.get().encode())]
            message = {**message, "headers": headers}
        await self._send(message)

    def _too_large(self) -> RequestError:
        return RequestError(
            413, "Body too large", f"a request body has at most {self._max_body_bytes} bytes; send several requests"
        )


async def _discard(_: Message) -> None:
    return None


def problem_response(error: RequestError) -> Response:
    """The problem document of `error` about the request that is being answered, with the headers of its status."""
    document = problem_document(
        error.status, error.title, error.detail, request_id=logs.request_id.get(), field=error.field
    )
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    # Not JSONResponse, which writes UTF-8: a detail may repeat half of a surrogate pair, which has none.
    return Response(json.dumps(document), error.status, headers, PROBLEM_MEDIA_TYPE)


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _request_id(scope: Scope) -> str:
    """The caller's X-Request-ID when it is a reasonable one, else a new one."""
    given = _header(scope, b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return uuid.uuid4().hex
