"""What the clients of both servers share, over httpx: split timeouts, readiness, problem documents.

What is asked again, and for how long, is outage.py's. Weight control is services/weight_transfer/control.py.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from services.clients.outage import Answer, Attempts, Outage, OutageBudget
from services.clients.replicas import Replicas
from services.config.addresses import checked_urls
from services.errors import ClientClosedError, InputError, PeerError, ProblemError, UnreadableAnswerError
from services.http.connections import (
    CONNECT_TIMEOUT_S,
    NAME_GRACE_S,
    async_client,
    describe,
    is_final,
    is_unresolved,
    retry_after_s,
    what_is_spoken,
)

logger = logging.getLogger(__name__)

Info = TypeVar("Info")

_POLL_S = 0.25
_KNOCK_S = 5.0


@dataclass(frozen=True)
class _NotReady:
    """What a server that is asked for readiness said, as what follows its URL, and how long more is worth waiting for."""

    said: str
    patience_s: float = math.inf


class ServerClient:
    """What both clients share: one connection pool, the key, retries, errors.

    The proxies of the environment are not used, its certificates (SSL_CERT_FILE, SSL_CERT_DIR) are.

    Args:
        urls: base URLs of equal servers; work is spread over them.
        key: bearer token, if the servers ask for one.
        timeout_s: how long to wait for an answer to begin, and between its parts.
        outage_s: how long work (scores, completions) is asked again while nobody answers, counted from its first failure.
        attempts: tries of the other requests, the first included.
        transport, clock: replace the network and the time in tests.

    Raises:
        InputError: a URL or the key cannot be used.
    """

    _READY_PATH = "/ready"
    _KEYLESS_AUTH: httpx.Auth | None = None
    """What a client without a key tries instead."""
    _SERVER = "a distillserve server"
    _NOBODY = "no server has answered"
    """How the error after an outage begins."""
    _SECTION = "rollout_client"
    _TIMEOUT_OPTION = "timeout_s"
    _OUTAGE_OPTION = "of a client in Python: outage_s"
    """What gives an outage more time where there is no run file."""
    _HAS_BASE_PATH = False

    def __init__(
        self,
        urls: list[str],
        *,
        key: str | None = None,
        timeout_s: float = 300.0,
        outage_s: float = 300.0,
        attempts: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(urls, str) or not urls:
            raise InputError(f"urls = {urls!r} must be a list of at least one URL, e.g. ['http://10.0.0.5:8101']")
        try:
            self.urls = checked_urls("urls", urls, base_path=self._HAS_BASE_PATH)
        except ValueError as error:
            raise InputError(str(error)) from None
        self._outage_s, self._attempts, self._clock = outage_s, attempts, clock
        self._reached = False
        self._replicas = Replicas(self.urls, longest_rest_s=outage_s, clock=clock)
        self._alone = {url: Replicas([url], clock=clock) for url in self.urls}
        """Each server, for what no other can answer in its stead."""
        self._http = async_client(self.urls, timeout_s, key, transport, None if key else self._KEYLESS_AUTH)

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
            PeerError: one is not ready after `timeout_s`, or answers what no wait will change.
        """
        await all_or_first_error([self._wait_ready(url, timeout_s, on_wait) for url in self.urls])

    async def _wait_ready(self, url: str, timeout_s: float, on_wait: Callable[[str], None] | None) -> None:
        started, announced = time.monotonic(), ""
        waited_s, option = 0.0, f"{self._SECTION}.startup_timeout_s"
        while (problem := await self._readiness_problem(url, timeout_s - waited_s)) is not None:
            waited_s = time.monotonic() - started
            if problem.patience_s == 0:
                raise PeerError(f"{url} {problem.said}")
            if waited_s > min(timeout_s, problem.patience_s):
                more = "" if waited_s <= timeout_s else "; look at its log"
                more += f", or raise {option}" if more and option not in problem.said else ""
                limit = min(timeout_s, problem.patience_s)
                raise PeerError(f"{url} is not ready after {limit:.0f} s: it {problem.said}{more}")
            if on_wait is not None and not announced:
                on_wait(url)
            if problem.said != announced:
                logger.log(
                    logging.WARNING if problem.patience_s < math.inf else logging.DEBUG, "%s %s", url, problem.said
                )
                announced = problem.said
            await asyncio.sleep(_POLL_S)

    async def _readiness_problem(self, url: str, left_s: float) -> _NotReady | None:
        self._check_open()
        try:
            wait_s = min(CONNECT_TIMEOUT_S, max(left_s, _POLL_S))
            response = await self._http.get(f"{url}{self._READY_PATH}", timeout=wait_s)
        except httpx.RequestError as error:
            is_connected = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            if is_connected and url.startswith("http:") and (spoken := await what_is_spoken(url)) is not None:
                return _NotReady(f"speaks {spoken}; correct {self._SECTION}.urls", 0.0)
            patience_s = 0.0 if is_final(error) else NAME_GRACE_S if is_unresolved(error) else math.inf
            return _NotReady(describe(error, f"{self._SECTION}.startup_timeout_s"), patience_s)
        self._reached = True
        status = response.status_code
        if response.is_success:
            return None
        if status in (408, 425, 429) or status >= 500:
            return _NotReady(f"answers {status}")
        return _NotReady(f"answers {self._READY_PATH} with {status}: {self._explain_refusal(response)}", 0.0)

    def _explain_refusal(self, response: httpx.Response) -> str:
        """What a status says that no server of ours gives here, and the fix."""
        if response.status_code in (401, 403):
            return f"it wants a key; give it in {self._key_variable} (or as `key`)"
        if response.has_redirect_location:
            return f"it points to {response.headers['location']}; give the URL of the server itself in {self._SECTION}.urls"
        return f"it is not {self._SERVER}; correct its URL"

    @property
    def _key_variable(self) -> str:
        return f"DISTILLSERVE_{self._SECTION.removesuffix('_client').upper()}_KEY"

    async def _get_info(self, url: str, kind: type[Info]) -> Info:
        try:
            response = await self._send("GET", url)
        except ProblemError as error:
            if error.status != 404:
                raise
            raise PeerError(f"{url} answered 404: it is not {self._SERVER}; correct its URL") from error
        try:
            return TypeAdapter(kind).validate_json(response.content)
        except ValidationError as error:
            problem = f"not a {kind.__name__}: {error.errors()[0]['msg']}"
            raise UnreadableAnswerError(url, problem, response.content) from error

    def _check_open(self) -> None:
        if self._http.is_closed:
            raise ClientClosedError(
                f"the {type(self).__name__} of {', '.join(self.urls)} is closed; make a new one, or ask before its close"
            )

    async def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        self._check_open()
        response = await self._http.request(method, url, **options)
        self._raise_for_problem(response)
        return response

    def _raise_for_problem(self, response: httpx.Response) -> None:
        """Turn an error answer into a ProblemError; the body must have been read.

        Raises:
            ProblemError: the status is not 2xx.
        """
        self._reached = True
        if response.is_success:
            return
        try:
            problem = response.json()
        except ValueError:
            problem = {}
        if not isinstance(problem, dict):
            problem = {}
        problem.setdefault("detail", response.text[:300])
        if response.status_code in (401, 403) or response.has_redirect_location:
            problem["detail"] = "; ".join(filter(None, (problem["detail"], self._explain_refusal(response))))
        error = ProblemError(str(response.request.url), response.status_code, problem)
        error.retry_after_s = retry_after_s(response)
        raise error

    async def _retrying(self, url: str, send: Callable[[str], Awaitable[Answer]]) -> Answer:
        """Run `send` with the URL of this server, up to `attempts` times while its errors may pass.

        Raises:
            PeerError: the last attempt's error.
        """
        outage = Outage(self._alone[url], self._TIMEOUT_OPTION, self._clock)
        return await outage.ask(send, Attempts(self._attempts, self._TIMEOUT_OPTION))

    async def _outlasting(self, replicas: Replicas, send: Callable[[str], Awaitable[Answer]]) -> Answer:
        """Run `send` with the URL of a replica, of others and again through an outage of `outage_s`.

        Raises:
            PeerError: none answered for `outage_s`; names what became of the last request to each.
            ProblemError: a replica refused the request for good.
        """
        budget = OutageBudget(
            self._NOBODY, self._outage_s, f"{self._SECTION}.outage_s", self._OUTAGE_OPTION, lambda: self._reached
        )
        return await Outage(replicas, self._TIMEOUT_OPTION, self._clock, self._knock).ask(send, budget)

    async def _knock(self, url: str) -> None:
        """Find out within seconds whether a server that was away lives: work that it swallows waits much longer.

        Raises:
            httpx.RequestError, ProblemError: it does not, or not yet.
        """
        self._check_open()
        response = await self._http.get(f"{url}{self._READY_PATH}", timeout=_KNOCK_S)
        if response.status_code >= 500:  # a gateway may not have the route
            self._raise_for_problem(response)


async def all_or_first_error(work: list[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """The results in order; at the first error the rest is cancelled, and nothing goes on in the background."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]
