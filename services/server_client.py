"""What the clients of both servers share, over httpx: split timeouts, retries that respect Retry-After, problem documents.

Retried are 408, 429, 5xx and transport errors, with jitter; never another 4xx: the same request would be
refused again. Weight control is services/weight_transfer/control.py.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Self, TypeVar

import httpx
import stamina
from pydantic import TypeAdapter, ValidationError

from services.errors import ClientClosedError, PeerError, ProblemError
from services.keys import key_headers

Info = TypeVar("Info")
Answer = TypeVar("Answer")

_CONNECT_TIMEOUT_S = 10.0
_POLL_S = 0.25
# A server that names a longer time is asked again all the same: attempts are bounded, and so should be their waits.
_LONGEST_RETRY_AFTER_S = 300.0


class ServerClient:
    """What both clients share: one connection pool, the key, retries, errors.

    Args:
        urls: base URLs of equal servers; work is spread over them.
        key: bearer token, if the servers ask for one.
        timeout_s: how long to wait for an answer to begin, and between its parts.
        attempts: tries of one request, the first included.
        transport: replaces the network in tests.
    """

    _READY_PATH = "/ready"
    _KEYLESS_AUTH: httpx.Auth | None = None
    """What a client without a key tries instead."""

    def __init__(
        self,
        urls: list[str],
        *,
        key: str | None = None,
        timeout_s: float = 300.0,
        attempts: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self._attempts = attempts
        self._http = httpx.AsyncClient(
            headers=key_headers(key),
            auth=None if key else self._KEYLESS_AUTH,
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=256),
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def wait_ready(self, timeout_s: float, on_wait: Callable[[str], None] | None = None) -> None:
        """Wait until every server answers /ready.

        Args:
            on_wait: called once per server that is not ready at first, with its URL.

        Raises:
            PeerError: one is not ready after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        for url in self.urls:
            announced = False
            while (problem := await self._readiness_problem(url)) is not None:
                if time.monotonic() > deadline:
                    raise PeerError(f"{url} is not ready after {timeout_s:.0f} s: {problem}")
                if on_wait is not None and not announced:
                    on_wait(url)
                    announced = True
                await asyncio.sleep(_POLL_S)

    async def _readiness_problem(self, url: str) -> str | None:
        self._check_open()
        try:
            response = await self._http.get(f"{url}{self._READY_PATH}", timeout=_CONNECT_TIMEOUT_S)
        except httpx.TransportError as error:
            return describe_transport_error(error)
        return None if response.is_success else f"it answers {response.status_code}"

    async def _get_info(self, url: str, kind: type[Info]) -> Info:
        response = await self._retrying(lambda: self._send("GET", url))
        try:
            return TypeAdapter(kind).validate_json(response.content)
        except ValidationError as error:
            raise PeerError(f"{url} is not a {kind.__name__}: {error.errors()[0]['msg']}") from error

    def _check_open(self) -> None:
        if self._http.is_closed:
            raise ClientClosedError(
                f"the {type(self).__name__} of {', '.join(self.urls)} is closed; make a new one, or ask before its close"
            )

    async def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        self._check_open()
        response = await self._http.request(method, url, **options)
        raise_for_problem(response)
        return response

    async def _retrying(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Run `call`, again after errors that may pass.

        Raises:
            PeerError: the last attempt's error.
        """
        try:
            async for attempt in stamina.retry_context(
                on=wait_before_retry, attempts=self._attempts, timeout=None, wait_initial=0.2, wait_max=10.0
            ):
                with attempt:
                    return await call()
        except httpx.TransportError as error:
            url = error.request.url if error._request is not None else self.urls
            raise PeerError(f"{url} cannot be reached: {describe_transport_error(error)}") from error
        raise AssertionError("unreachable: stamina either returns or raises")


def raise_for_problem(response: httpx.Response) -> None:
    """Turn an error answer into a ProblemError; the body must have been read.

    Raises:
        ProblemError: the status is not 2xx.
    """
    if response.is_success:
        return
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    problem.setdefault("detail", response.text[:300])
    error = ProblemError(str(response.request.url), response.status_code, problem)
    error.retry_after_s = _seconds(response.headers.get("Retry-After"))
    raise error


def may_pass(error: Exception) -> bool:
    """Whether the same request may be answered later."""
    if isinstance(error, ProblemError):
        return error.status in (408, 429) or error.status >= 500
    return isinstance(error, httpx.TransportError)


def wait_before_retry(error: Exception) -> bool | float:
    """False: do not retry; True: after stamina's own backoff; a number: after that many seconds."""
    if isinstance(error, ProblemError) and may_pass(error) and error.retry_after_s is not None:
        # A little jitter, so that clients that were refused together do not return together.
        return min(error.retry_after_s, _LONGEST_RETRY_AFTER_S) * random.uniform(1.0, 1.25)
    return may_pass(error)


def describe_transport_error(error: httpx.TransportError) -> str:
    return f"{type(error).__name__} {error}".strip()


async def all_or_first_error(work: list[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """The results in order; at the first error the rest is cancelled, and nothing goes on in the background."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


def _seconds(header: str | None) -> float | None:
    try:
        seconds = float(header or "nan")
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
