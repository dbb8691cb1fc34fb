"""An event loop in a thread of its own, beside a main thread that computes."""

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import Any, Self, TypeVar

from services.process.signals import Interruption

Result = TypeVar("Result")

_POLL_S = 0.2


class EventLoopThread:
    """Runs coroutines for the main thread; leaving the block cancels those that are left, and waits for them.

    Unlike anyio's portal, which cancels at every `await`, it cancels once: what is cancelled may wait while it cleans up.

    Args:
        interruption: its signals end what the main thread waits for.
    """

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption
        self._dead: Exception | None = None
        self._started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._work, name="event-loop", daemon=True)

    def _work(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)  # no descriptors are left, say

    async def _serve(self) -> None:
        is_over = asyncio.Event()
        self._started.set_result((asyncio.get_running_loop(), is_over))
        await is_over.wait()

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.result()
        return self

    def __exit__(self, *_: object) -> None:
        loop, is_over = self._started.result()
        loop.call_soon_threadsafe(is_over.set)
        while self._thread.is_alive() and self._dead is None:
            self._thread.join(_POLL_S)

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Run a callback in the loop, without waiting for it."""
        loop, _ = self._started.result()
        with suppress(RuntimeError):  # the loop is over
            loop.call_soon_threadsafe(callback)

    def give_up(self, error: Exception) -> None:
        """From another thread: the loop does not turn any more. Whoever waits for it, now or later, gets this error; its
        thread is left to itself, and ends with the process."""
        self._dead = error

    def where(self) -> str:
        """What the loop's thread is doing, e.g. "generate (rollouts.py, line 12)"."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is None:
            return "nothing"
        code = frame.f_code
        return f"{code.co_name} ({code.co_filename}, line {frame.f_lineno})"

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._dead

    def run(self, function: Callable[..., Coroutine[Any, Any, Result]], *arguments: Any) -> Result:
        """The result of `function(*arguments)`, a coroutine. On a signal it is cancelled, and has cleaned up when this ends.

        Raises:
            Interrupted: a signal came.
            Exception: that of the coroutine, or what the interruption or `give_up` was given by another thread.
        """
        self._check_alive()
        loop, _ = self._started.result()
        tasks: list[asyncio.Task[Result]] = []
        ended: Future[Result] = Future()

        def begin() -> None:
            tasks.append(loop.create_task(function(*arguments)))
            tasks[0].add_done_callback(partial(_hand_over, ended))

        def cancel() -> None:
            if tasks:
                tasks[0].cancel()
            else:
                ended.set_exception(asyncio.CancelledError())

        try:
            with self._interruption.raising():
                loop.call_soon_threadsafe(begin)
                while not wait([ended], timeout=_POLL_S).done:
                    self._check_alive()
                    self._interruption.check()  # of what another thread has found
                return ended.result()
        except BaseException:
            with self._interruption.raising():
                loop.call_soon_threadsafe(cancel)
                while not wait([ended], timeout=_POLL_S).done:
                    self._check_alive()
            raise


def _hand_over(ended: "Future[Any]", task: "asyncio.Task[Any]") -> None:
    if task.cancelled():
        ended.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        ended.set_exception(error)
    else:
        ended.set_result(task.result())
