"""Which of several equal servers gets the next request, and which are left alone for a while.

A replica that fails `failures_to_eject` times in a row (a broken connection, a 5xx without Retry-After) is out for a
growing, jittered, bounded time. Then it gets one request; if that one is answered, the replica is back. One that makes its
requests wait until they time out is asked less often than that, so that most of the work is not held up. One that says
itself when to come back (Retry-After) is alive: it only rests. When nobody is left, the one that is due first is asked.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger(__name__)

_FAILURES_TO_EJECT = 3
_FIRST_EJECTION_S = 1.0
_LONGEST_EJECTION_S = 60.0
# How many times as long as its failed requests took a replica is spared, at most.
_MOST_SPARED = 4
# Between two lines that tell of an outage.
_TELL_EVERY_S = 30.0


@dataclass(eq=False)
class Replica:
    """One server, as its requests so far describe it; times are of the clock of its `Replicas`, seconds."""

    url: str
    num_in_flight: int = 0
    """Requests of ours without an answer."""
    last_asked: int = 0
    """Position of its newest request in the order of all requests."""
    failures: int = 0
    """In a row."""
    ejections: int = 0
    """In a row; 0 when it is in."""
    ejected_at: float = 0.0
    due: float = 0.0
    """Not to be asked before, while others can be."""
    spared_until: float = 0.0
    """Not to be asked before, while another one is in: its requests hold up whoever sends them."""
    trial: bool = False
    """Whether a request is under way that decides whether it is back."""
    epoch: int = 0
    """Changes when it leaves, fails its trial or returns."""


@dataclass(frozen=True)
class Lease:
    """One request on a replica. Its result counts only for the epoch in which it was sent: the requests that were
    under way when a replica left all fail, and must not each prolong its absence."""

    replica: Replica
    epoch: int
    asked_at: float
    is_trial: bool
    """Whether it asks one that was out while another one is in."""

    @property
    def url(self) -> str:
        return self.replica.url


class Replicas:
    """Equal servers by URL.

    Args:
        failures_to_eject: failures in a row after which a replica is out.
        longest_rest_s: what is believed of a Retry-After, seconds.
        clock: seconds, monotonic.
        jitter: a random factor between its two arguments.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        failures_to_eject: int = _FAILURES_TO_EJECT,
        longest_rest_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._replicas = [Replica(url) for url in urls]
        self._failures_to_eject, self._longest_rest_s = failures_to_eject, longest_rest_s
        self._clock, self._jitter = clock, jitter
        self._num_asked = 0
        self._told = -math.inf

    @contextmanager
    def lease(self, tried: Collection[str] = ()) -> Iterator[Lease]:
        """The lease of one request; report what became of it with `answered`, `rest` or `failed`.

        Args:
            tried: URLs to avoid while another can be asked.
        """
        replica = self._choose(tried)
        self._num_asked += 1
        replica.last_asked = self._num_asked
        replica.num_in_flight += 1
        replica.trial = replica.ejections > 0
        lease = Lease(replica, replica.epoch, self._clock(), replica.trial and self._is_any_in())
        try:
            yield lease
        finally:
            replica.num_in_flight -= 1
            if self._counts(lease):  # a cancelled trial has decided nothing; the next request is one
                replica.trial = False

    def has_untried(self, tried: Collection[str]) -> bool:
        """Whether a replica outside `tried` can be asked at once."""
        return any(self._can_be_asked(r) for r in self._replicas if r.url not in tried)

    def rest_s(self) -> float:
        """Seconds until the first replica has rested as long as it asked for; 0 when one does not rest."""
        now = self._clock()
        return max(0.0, min(0.0 if r.ejections else r.due - now for r in self._replicas))

    def answered(self, lease: Lease) -> None:
        """The replica answered, if only to refuse this very request."""
        if not self._counts(lease):
            return
        replica = lease.replica
        if replica.ejections:
            logger.info("%s is back after %.1f s", replica.url, self._clock() - replica.ejected_at)
            replica.epoch += 1
        replica.failures = replica.ejections = 0
        replica.trial = False

    def rest(self, lease: Lease, seconds: float) -> None:
        """The replica lives and wants to be left alone: a full queue, a model that is being loaded."""
        self.answered(lease)
        lease.replica.due = max(lease.replica.due, self._clock() + min(seconds, self._longest_rest_s))

    def failed(self, lease: Lease, reason: str) -> None:
        """The replica did not answer, or answered that it is broken."""
        if not self._counts(lease):
            return
        replica = lease.replica
        replica.failures += 1
        if replica.failures < self._failures_to_eject and not replica.ejections:
            return
        is_first = not replica.ejections
        seconds = self._eject(lease)
        if is_first:
            text = "%s is left alone for %.1f s after %d failures in a row, the last one: %s"
            logger.warning(text, replica.url, seconds, replica.failures, reason)

    def set_aside(self, lease: Lease, reason: str) -> None:
        """What the replica answers is not to be used, as a request that it gets now and then may find differently."""
        if not self._counts(lease):
            return
        if not lease.replica.ejections:
            others = " while others answer" if len(self._replicas) > 1 else ""
            logger.warning("%s is set aside%s: %s", lease.url, others, reason)
        self._eject(lease)

    def _eject(self, lease: Lease) -> float:
        """Leave a replica alone, each time for longer; returns for how long, seconds."""
        replica = lease.replica
        seconds = min(_LONGEST_EJECTION_S, _FIRST_EJECTION_S * 2.0 ** min(replica.ejections, 16)) * self._jitter(
            0.75, 1.0
        )
        now = self._clock()
        if not replica.ejections:
            replica.ejected_at = now
        replica.due = now + seconds
        replica.ejections += 1
        replica.spared_until = now + (now - lease.asked_at) * min(replica.ejections, _MOST_SPARED)
        replica.epoch += 1
        replica.trial = False
        return seconds

    def wait_is_worth_telling(self, lasted_s: float) -> bool:
        """Whether a request that nobody has answered for so long is to tell so: none has lately."""
        now = self._clock()
        if lasted_s < _TELL_EVERY_S or now - self._told < _TELL_EVERY_S:
            return False
        self._told = now
        return True

    def _counts(self, lease: Lease) -> bool:
        return lease.epoch == lease.replica.epoch

    def _can_be_asked(self, replica: Replica) -> bool:
        now = self._clock()
        is_spared = replica.ejections > 0 and replica.spared_until > now and self._is_any_in()
        return replica.due <= now and not replica.trial and not is_spared

    def _is_any_in(self) -> bool:
        return any(not replica.ejections for replica in self._replicas)

    def _choose(self, tried: Collection[str]) -> Replica:
        able = [r for r in self._replicas if self._can_be_asked(r)]
        fresh = [r for r in able if r.url not in tried] or able
        if fresh:
            # One that is out and due comes first: it would never be tried again while the others are idle.
            return min(fresh, key=lambda r: (r.ejections == 0, r.num_in_flight, r.last_asked))
        return min(self._replicas, key=lambda r: (r.trial, r.due, r.num_in_flight, r.last_asked))
