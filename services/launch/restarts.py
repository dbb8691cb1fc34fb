"""When a process of a run that has ended is started again: how often, after which pause, and after which ends at all."""

import math
import signal

from services.errors import ConfigError, OutageError, RankLostError, StartupError

LONGEST_BACKOFF_S = 60.0
_MOST_DOUBLINGS = 16
HEALTHY_S = 600.0
"""After so long a time without an end a server's count begins anew, as that of a container does in Kubernetes."""

# Somebody who sends one of these wants an end.
_ASKED_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RestartPolicy:
    """How often and after which pause one process is started again. Knows no clock: it is told the time.

    Args:
        most: starts again in a row.
        backoff_s: pause before the first of them, seconds; each that follows waits twice as long.
        healthy_s: time from a start to the next end that makes it the first in a row again, seconds.
    """

    def __init__(self, most: int, backoff_s: float, healthy_s: float = math.inf) -> None:
        self.most = most
        self.count = 0
        """Starts again in a row so far."""
        self._backoff_s, self._healthy_s = backoff_s, healthy_s
        self._healthy_since = math.inf

    def __str__(self) -> str:
        """E.g. "1 of 3"."""
        return f"{self.count} of {self.most}"

    def is_healthy(self, now: float) -> None:
        """The process works since `now`, seconds of any clock."""
        self._healthy_since = now

    def backoff_s(self, now: float) -> float | None:
        """The process has ended: the pause before it is started again, seconds; None: not again."""
        if now - self._healthy_since >= self._healthy_s:
            self.count = 0
        self._healthy_since = math.inf
        if self.count >= self.most:
            return None
        self.count += 1
        return min(self._backoff_s * 2 ** min(self.count - 1, _MOST_DOUBLINGS), LONGEST_BACKOFF_S)


def mends_server(code: int) -> bool:
    """Whether a server that ended with this code, negative for a signal, may do better when it is started again: a wrong
    option, or a port that is taken, stays as it is."""
    return code not in (ConfigError.exit_code, StartupError.exit_code)


def mends_trainer(code: int) -> bool:
    """Whether a trainer whose rank ended with this code may go on from its checkpoint: it was killed, has lost a rank, or its
    servers were away for too long. Its own errors stay as they are."""
    return code in (RankLostError.exit_code, OutageError.exit_code) or (code < 0 and -code not in _ASKED_TO_END)
