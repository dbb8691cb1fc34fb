"""Signals that ask a process to end: SIGTERM and SIGHUP do what Ctrl-C does, also in a container's first process.

The kernel drops a signal that the first process of a container has no handler for, so there is one from the start.
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")
Handler = Callable[[int, FrameType | None], Any]

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
            signal.signal(number, before[number])


class Interruption:
    """What a signal does to the work of `run_until_signalled`: it ends it at once or, after `defer`, cancels it, so that it
    can bring what it has begun to an end. A second Ctrl-C does not wait for that. Other signals come twice without
    anybody being in a hurry: a terminal that closes, a service manager that signals a whole group."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._task: asyncio.Task[Any] | None = None

    def defer(self) -> None:
        """From now on the first signal cancels the calling task."""
        self._task = asyncio.current_task()

    def handle(self, number: int, frame: FrameType | None) -> None:
        is_hurry = self.number is not None and number == signal.SIGINT
        if self._task is None or self._task.done() or is_hurry:
            raise Interrupted(number)
        if self.number is None:
            self.number = number
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)


def run_until_signalled(main: Callable[[Interruption], Coroutine[Any, Any, Result]]) -> Result:
    """`asyncio.run` whose work SIGINT, SIGTERM and SIGHUP interrupt.

    Raises:
        Interrupted: one of them came.
    """
    interruption = Interruption()
    with handling(interruption.handle, *_ENDING):
        try:
            return asyncio.run(main(interruption))
        except asyncio.CancelledError:
            if interruption.number is None:
                raise
            raise Interrupted(interruption.number) from None
