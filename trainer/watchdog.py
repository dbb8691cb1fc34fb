"""Notices what shows no sign of life, and says who waits for it; ends the run where it is dead rather than slow.

consumes   services/process/waiting.py: what is waited for, and the signs of life of each
produces   a line where one has taken longer than is usual, with growing intervals; the end of the run for a dead one
waits for  nothing but the next second, in a thread of its own

Slow may be what has a deadline or an outage budget of its own: servers. Dead is the event loop when no callback returns, and a
rank whose process does nothing (SIGSTOP, a machine that swaps). A process that ends is not this one's business: the kernel
closes its connections.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from services.config import RunConfig
from services.errors import DistillServeError
from services.process.event_loop import EventLoopThread
from services.process.signals import Interruption
from services.process.waiting import WAITS, Wait, Waits

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_PATIENCE_S = 60.0
# How much longer than the longest so far of its kind a wait may take.
_UNUSUAL = 3.0


@dataclass
class _Watched:
    num_signs: int
    silent_s: float = 0.0
    """Since the last sign of life, while this process ran."""
    warn_at_s: float = 0.0


class Watchdog:
    """Looks at all waits once a second, until the block is left.

    Args:
        dead_s: silence after which what may be dead is dead, seconds.
        patience_s: silence after which a line is logged, seconds.
    """

    def __init__(self, *, dead_s: float, patience_s: float = _PATIENCE_S, waits: Waits = WAITS) -> None:
        self._dead_s, self._patience_s, self._waits = dead_s, min(patience_s, dead_s / 2), waits
        self._watched: dict[Wait, _Watched] = {}
        self._usual_s: dict[str, float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._done.wait(_TICK_S):
            now = time.monotonic()
            self.look(now - looked)
            looked = now

    def look(self, elapsed_s: float) -> None:
        """Look at all waits.

        Args:
            elapsed_s: since the last look. Where it is much, this process, or the machine, was suspended, and nobody was silent.
        """
        elapsed_s = min(elapsed_s, 2 * _TICK_S)
        waits = self._waits.now()
        for wait in waits:
            wait.ask_for_sign()
        for wait in self._watched.keys() - waits:
            if wait.has_come:
                self._note_usual(wait, self._watched[wait])
        self._watched = {wait: self._watched.get(wait) or _Watched(wait.num_signs) for wait in waits}
        for wait, watched in self._watched.items():
            self._note_signs(wait, watched, elapsed_s)
        for wait in sorted(waits, key=lambda wait: -self._watched[wait].silent_s):
            self._judge(wait, self._watched[wait])

    def _note_signs(self, wait: Wait, watched: _Watched, elapsed_s: float) -> None:
        if wait.num_signs == watched.num_signs:
            watched.silent_s += elapsed_s
            return
        self._note_usual(wait, watched)
        watched.num_signs, watched.silent_s, watched.warn_at_s = wait.num_signs, 0.0, 0.0

    def _note_usual(self, wait: Wait, watched: _Watched) -> None:
        self._usual_s[wait.kind] = max(self._usual_s.get(wait.kind, 0.0), watched.silent_s)

    def _judge(self, wait: Wait, watched: _Watched) -> None:
        """Log one line where a silence is unusual, of all that wait for the same; end the run where it is one of death."""
        unusual_s = max(self._patience_s, _UNUSUAL * self._usual_s.get(wait.kind, 0.0))
        if watched.silent_s >= max(unusual_s, watched.warn_at_s):
            logger.warning("%s", describe(wait, watched.silent_s))
            for other, of_other in self._watched.items():
                if (other.who, other.what) == (wait.who, wait.what):
                    of_other.warn_at_s = 2 * watched.silent_s
        if wait.on_dead is not None and watched.silent_s >= self._dead_s:
            self._waits.remove(wait)
            wait.on_dead(f"{wait.what} has shown no sign of life for {watched.silent_s:.0f} s (trainer.watchdog_s)")


def describe(wait: Wait, silent_s: float) -> str:
    """A line about what is waited for."""
    progress = f": {wait.progress}" if wait.progress else ""
    return f"{wait.who} has waited {silent_s:.0f} s for {wait.what} without a sign of life{progress}"


@contextmanager
def watching(config: RunConfig, interruption: Interruption, slowest_call_s: float = 0.0) -> Iterator[EventLoopThread]:
    """An event loop beside this thread, and a watchdog over it and all else that is waited for.

    Args:
        interruption: told of what is dead; its signals end what this thread waits for.
        slowest_call_s: how long the user's own function may keep the loop.
    """
    event_loop = EventLoopThread(interruption)
    pulse = LoopPulse(event_loop, interruption.fail)
    with Watchdog(dead_s=max(config.trainer.watchdog_s, slowest_call_s)):
        try:
            with event_loop:
                WAITS.add(pulse)
                yield event_loop
        finally:
            WAITS.remove(pulse)


class LoopPulse(Wait):
    """The event loop as something that the run waits for: it turns, or a callback keeps it that does not return.

    Args:
        fail: told, in another thread, when it is dead.
    """

    def __init__(self, event_loop: EventLoopThread, fail: Callable[[DistillServeError], None]) -> None:
        super().__init__("the run", "the event loop of the pipeline", "event loop", self._give_up)
        self._event_loop, self._fail = event_loop, fail
        self._is_asked = False

    def ask_for_sign(self) -> None:
        if not self._is_asked:
            self._is_asked = True
            self._event_loop.call_soon(self._turned)

    def _turned(self) -> None:
        self._is_asked = False
        self.alive()

    def _give_up(self, text: str) -> None:
        error = DistillServeError(f"{text}: {self._event_loop.where()} does not return")
        self._fail(error)
        self._event_loop.give_up(error)
