"""Whose a rollout server is: one run holds it, and renews its lease for as long as it lives.

Two trainers that push to one server train on each other's policy, and nothing in their numbers says so. So every weight
route and every completion for training names its run, and one that does not hold the server is refused.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.errors import RequestError
from services.wire.weights import NOT_HELD

CONFLICT = 409
# Run, number of the attempt, and which process it is.
_ATTEMPT = re.compile(r"(.+)-([0-9]+)_[0-9a-z]+")


@dataclass
class Lease:
    run: str
    name: str
    """What a person knows the run by."""
    since: str
    """Clock time at which it took the server."""
    lease_s: float
    renewed_at: float


class Holder:
    """Of one server.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.lease: Lease | None = None

    @property
    def left_s(self) -> float:
        """How long the holder may still be silent; 0 when its lease is over or nobody holds the server."""
        if self.lease is None:
            return 0.0
        return max(0.0, self.lease.renewed_at + self.lease.lease_s - self._clock())

    def hold(self, run: str, name: str, lease_s: float, *, take_over: bool = False) -> bool:
        """Give the server to a run, or renew its lease. A later attempt of the holder's run gets it at once: the one before it
        has ended.

        Returns:
            whether it was not this run's before.

        Raises:
            RequestError: another run holds it; `retry_after_s` is what is left of its lease.
        """
        if self.lease is not None and self.lease.run == run:
            self.lease.renewed_at, self.lease.lease_s = self._clock(), lease_s
            return False
        if self.lease is not None and self.left_s > 0 and not (take_over or _is_later_attempt(run, self.lease.run)):
            raise RequestError(
                CONFLICT,
                "Held by another run",
                f"this rollout server is held by {self.described()}; end that run, give this one a server of its own, or take "
                "this server from it with --weight_sync.take_over true",
                field="run",
                retry_after_s=self.left_s,
            )
        self.lease = Lease(run, name, time.strftime("%H:%M:%S"), lease_s, self._clock())
        return True

    def check(self, run: str) -> None:
        """Refuse a run that does not hold the server.

        Raises:
            RequestError: another run does, or none: the server was started again since.
        """
        if self.lease is None:
            raise RequestError(
                CONFLICT,
                NOT_HELD,
                f"the run {run} does not hold this rollout server: nobody does. The server was started again, or the run was "
                "silent for longer than its lease; start the run again",
                field="run",
            )
        if self.lease.run != run:
            raise RequestError(
                CONFLICT,
                "Held by another run",
                f"this rollout server is held by {self.described()}, which took it from the run {run}; give each run a server "
                "of its own",
                field="run",
            )

    def release(self, run: str | None = None) -> None:
        """Nobody holds the server any more, or not this run."""
        if run is None or (self.lease is not None and self.lease.run == run):
            self.lease = None

    def described(self) -> str:
        """The run that holds the server, for people."""
        return (
            "nobody"
            if self.lease is None
            else f"the run {self.lease.run} ({self.lease.name}, since {self.lease.since})"
        )


def _is_later_attempt(run: str, holder: str) -> bool:
    """Whether a name, e.g. "3f9c2a1b-2_c0de", is of a later attempt of the same run than another, "3f9c2a1b-1_beef"."""
    ours, theirs = _ATTEMPT.fullmatch(run), _ATTEMPT.fullmatch(holder)
    return ours is not None and theirs is not None and ours[1] == theirs[1] and int(ours[2]) > int(theirs[2])
