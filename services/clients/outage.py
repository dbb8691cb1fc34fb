"""Asking equal servers until one of them answers: the one loop of both clients.

consumes   a request that may be asked twice, and the servers that can answer it
produces   the first answer, or an error that no wait will change
waits for  servers that are down, full or slow: longer each time, or as long as they say themselves (Retry-After)
unblocked  by an answer; without one, by the end of what `Attempts` or `OutageBudget` allow

Waited for are 408, 429, 5xx, answers that cannot be read (a page of a proxy) and transport errors that may pass
(services/http/connections.py); never another 4xx: the same request would be refused again.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import httpx

from services.clients.replicas import Lease, Replicas
from services.errors import ChangedTeacherError, OutageError, PeerError, ProblemError, UnreadableAnswerError
from services.http.connections import NAME_GRACE_S, describe, is_final, is_unresolved, request_of

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 10.0


@dataclass(frozen=True)
class Failure:
    """Why the last request to a server was not answered, which may pass."""

    url: str
    error: httpx.RequestError | PeerError
    said: str
    """What follows the URL in a message, e.g. "cannot be reached: nothing listens there"."""


class GiveUp(Protocol):
    """When a request that nobody answers is given up, and with which error."""

    def left_s(self, outage: "Outage") -> float:
        """How much longer it may wait, seconds; none at 0."""

    def error(self, outage: "Outage") -> PeerError: ...


class Outage:
    """One request, and what has become of it since the first server failed to answer it.

    Args:
        replicas: the servers that can answer it.
        timeout_option: what to raise where a server is alive but slow.
        clock: seconds, monotonic.
        knock: asks a server, at a URL, whether it lives; it comes before a request that another server could take.
    """

    def __init__(
        self,
        replicas: Replicas,
        timeout_option: str,
        clock: Callable[[], float] = time.monotonic,
        knock: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._replicas, self._timeout_option, self._clock, self._knock = replicas, timeout_option, clock, knock
        self._started = clock()
        self._first_failed: float | None = None
        self._tried: set[str] = set()
        self._num_waits = 0
        self.num_tries = 0
        self.failures: dict[str, Failure] = {}
        """The last one of each server, by URL."""
        self.newest: Failure | None = None

    @property
    def asked_s(self) -> float:
        """Seconds since the request was first sent."""
        return self._clock() - self._started

    @property
    def lasted_s(self) -> float:
        """Seconds since it first failed."""
        return 0.0 if self._first_failed is None else self._clock() - self._first_failed

    async def ask(self, send: Callable[[str], Awaitable[Answer]], give_up: GiveUp) -> Answer:
        """Run `send` with the URL of a server, of another one at once when that fails, and of all again after a wait.

        Raises:
            PeerError: none answered until `give_up`, one refused the request for good (ProblemError), or answered wrongly.
        """
        while True:
            with self._replicas.lease(self._tried) as lease:
                self.num_tries += 1
                try:
                    if lease.is_trial and self._knock is not None:
                        await self._knock(lease.url)
                    answer = await send(lease.url)
                    self._replicas.answered(lease)
                    return answer
                except (httpx.RequestError, PeerError) as error:
                    self._add_failure(lease, error)
            if not self._replicas.has_untried(self._tried):
                await self._wait(give_up)

    async def _wait(self, give_up: GiveUp) -> None:
        left_s = give_up.left_s(self)
        if left_s <= 0:
            assert self.newest is not None
            error, reason = give_up.error(self), self.newest.error
            raise error from (reason if error is not reason else None)
        self._tell_of_wait(left_s)
        # All rest: a little longer than they asked for, so that those who were refused together part.
        rest_s = self._replicas.rest_s() * random.uniform(1.0, 1.25)
        await asyncio.sleep(min(max(_backoff_s(self._num_waits), rest_s), left_s))
        self._num_waits += 1
        self._tried.clear()

    def _tell_of_wait(self, left_s: float) -> None:
        """Log that nobody answers, now and then; of all requests that wait for these servers one line."""
        if math.isfinite(left_s) and self._replicas.wait_is_worth_telling(self.lasted_s):
            said = "; ".join(f"{failure.url} {failure.said}" for failure in self.failures.values())
            logger.warning("no answer for %.0f s, and waiting up to %.0f s more: %s", self.lasted_s, left_s, said)

    def _add_failure(self, lease: Lease, error: httpx.RequestError | PeerError) -> None:
        """Note a failure that may pass, and tell `Replicas` what it says of the server.

        Raises:
            PeerError: it will not pass.
        """
        if not may_pass(error):
            self._replicas.answered(lease)
            if isinstance(error, PeerError):
                raise error
            raise PeerError(f"{lease.url} {describe(error, self._timeout_option)}") from error
        failure = self.newest = Failure(lease.url, error, _describe_failure(error, self._timeout_option))
        self._tell_replicas(lease, failure)
        self.failures[lease.url] = failure
        self._tried.add(lease.url)
        if self._first_failed is None:
            self._first_failed = self._clock()

    def _tell_replicas(self, lease: Lease, failure: Failure) -> None:
        error = failure.error
        if isinstance(error, httpx.RequestError):
            self._replicas.failed(lease, failure.said)
        elif not isinstance(error, ProblemError):
            self._replicas.set_aside(lease, failure.said)
        elif error.retry_after_s is not None:
            self._replicas.rest(lease, error.retry_after_s)
        elif error.status >= 500:
            self._replicas.failed(lease, failure.said)
        else:
            self._replicas.answered(lease)


@dataclass(frozen=True)
class Attempts:
    """A request is given up after so many tries, with the last one's error."""

    most: int
    timeout_option: str

    def left_s(self, outage: Outage) -> float:
        return math.inf if outage.num_tries < self.most else 0.0

    def error(self, outage: Outage) -> PeerError:
        last = outage.newest
        assert last is not None  # a request is given up after a failure
        if isinstance(last.error, PeerError):
            return last.error
        return unanswered(last.url, last.error, self.timeout_option, outage.num_tries, outage.asked_s)


@dataclass(frozen=True)
class OutageBudget:
    """A request is given up so long after its first failure.

    Attributes:
        who: how the error begins, e.g. "no teacher has answered".
        outage_s: the budget, seconds.
        option: what is to be raised for more.
        longer: the same for those who have no run file.
        was_reached: whether any of the servers has ever answered this client.
    """

    who: str
    outage_s: float
    option: str
    longer: str
    was_reached: Callable[[], bool]

    def left_s(self, outage: Outage) -> float:
        return self._patience_s(outage) - outage.lasted_s

    def _patience_s(self, outage: Outage) -> float:
        """Names that were never right are no outage, those of a server that is being moved are."""
        is_nameless = all(is_unresolved(failure.error) for failure in outage.failures.values())
        return min(self.outage_s, NAME_GRACE_S) if is_nameless and not self.was_reached() else self.outage_s

    def error(self, outage: Outage) -> OutageError:
        patience_s = self._patience_s(outage)
        said = "; ".join(f"{url} {failure.said}" for url, failure in outage.failures.items())
        more = f"; to wait longer, raise {self.option} ({self.longer})" if patience_s == self.outage_s else ""
        return OutageError(f"{self.who} for {patience_s:g} s ({self.option}): {said}{more}")


def may_pass(error: Exception) -> bool:
    """Whether the same request may be answered later."""
    if isinstance(error, ProblemError):
        return error.status in (408, 429) or error.status >= 500
    if isinstance(error, ChangedTeacherError):
        return error.may_pass
    if isinstance(error, UnreadableAnswerError):
        return True
    return isinstance(error, httpx.RequestError) and not is_final(error)


def unanswered(url: str, error: httpx.RequestError, timeout_option: str, tries: int, seconds: float) -> PeerError:
    """What was asked of whom, how often and for how long, and why there is no answer.

    Args:
        url: whom, where the error itself does not say what was asked.
    """
    request = request_of(error)
    asked, method = (url, "asked") if request is None else (str(request.url), request.method)
    how = f"{method}, {tries} {'try' if tries == 1 else 'tries'} in {seconds:.1f} s"
    return PeerError(f"{asked} {describe(error, timeout_option)} ({how})")


def _describe_failure(error: httpx.RequestError | PeerError, timeout_option: str) -> str:
    if isinstance(error, httpx.RequestError):
        return describe(error, timeout_option)
    if isinstance(error, UnreadableAnswerError):
        return error.said
    if not isinstance(error, ProblemError):
        return str(error)
    detail = error.problem.get("detail") or error.problem.get("title")
    return f"answered {error.status}" + (f" ({detail})" if detail else "")


def _backoff_s(num_waits: int) -> float:
    return min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(num_waits, 16) + random.uniform(0.0, 1.0))
