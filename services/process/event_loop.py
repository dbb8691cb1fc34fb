"""An event loop in a thread of its own, beside a main thread that computes."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
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
        self._thread.join()

    def run(self, function: Callable[..., Coroutine[Any, Any, Result]], *arguments: Any) -> Result:
        """The result of `function(*arguments)`, a coroutine. On a signal it is cancelled, and has cleaned up when this ends.

        Raises:
            Interrupted: a signal came.
            Exception: that of the coroutine, or what the interruption was given by another thread.
        """
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
                    self._interruption.check()  # of what another thread has found
                return ended.result()
        except BaseException:
            with self._interruption.raising():
                loop.call_soon_threadsafe(cancel)
                wait([ended])
            raise


def _hand_over(ended: "Future[Any]", task: "asyncio.Task[Any]") -> None:
    if task.cancelled():
        ended.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        ended.set_exception(error)
    else:
        ended.set_result(task.result())
