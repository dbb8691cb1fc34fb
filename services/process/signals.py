"""Signals that ask a process to end: SIGTERM and SIGHUP do what Ctrl-C does, also in a container's first process.

The kernel drops a signal that the first process of a container has no handler for, so there is one from the start.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def raise_interrupted(number: int, frame: FrameType | None) -> None:
    """A handler that ends the work at once."""
    raise Interrupted(number)


@contextmanager
def handling(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Let `handler` have these signals inside the block, of the main thread; one that is ignored (nohup) stays ignored."""
    before = {number: signal.getsignal(number) for number in numbers}
    mine = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in mine:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number] or signal.SIG_DFL)  # None: nobody's of Python


class Interruption:
    """What a signal does to the main thread.

    Before `defer` it raises `Interrupted` at once. After `defer` it is remembered, and raised by the next `check` or in the
    next block of `raising`: nothing is torn elsewhere. Once it has been raised, only a second Ctrl-C raises again, in blocks
    of `raising` alone. Other signals come twice without anybody being in a hurry: a terminal that closes, a service manager
    that signals a whole group.
    """

    def __init__(self) -> None:
        self._reason: BaseException | None = None
        self._depth = 1  # of blocks of `raising`
        self._is_ending = False

    def defer(self) -> None:
        """From now on a signal waits for `check` or `raising`."""
        self._depth = 0

    def end(self) -> None:
        """From now on a first signal is not raised any more: what is left is done in order."""
        self._is_ending = True

    @property
    def is_due(self) -> bool:
        """Whether `check` would raise."""
        return self._reason is not None and not self._is_ending

    def check(self) -> None:
        """A place where the work may end.

        Raises:
            Interrupted: a signal has come.
            Exception: what `fail` was given.
        """
        if self._reason is not None and not self._is_ending:
            self._is_ending = True
            raise self._reason

    def fail(self, reason: BaseException) -> None:
        """From another thread: the next `check` raises this; who waits for an event loop checks a few times a second."""
        if self._reason is None or isinstance(self._reason, Interrupted):
            self._reason = reason

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """A block inside of `raising` that must not be torn."""
        depth, self._depth = self._depth, 0
        try:
            yield
        finally:
            self._depth = depth

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A block that may end anywhere: it only waits or measures, or what it does may be given up.

        Raises:
            Interrupted: a signal came.
        """
        self._depth += 1
        try:
            self.check()
            yield
        except Interrupted:
            self._is_ending = (
                True  # not before: what is raised in a destructor is lost, and the next signal raises again
            )
            raise
        finally:
            self._depth -= 1

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        is_first = self._reason is None
        self._reason = self._reason or Interrupted(number)
        if self._depth and not self._is_ending:
            raise self._reason
        if self._depth and number == signal.SIGINT and not is_first:
            raise Interrupted(number)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """SIGINT, SIGTERM and SIGHUP are the interruption's inside the block; in a thread that cannot have signals, nothing's."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    with handling(interruption.handle, *ENDING):
        yield interruption
