"""An event loop whose time passes only while everybody waits: hours of it cost nothing, and nothing is late."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Selector(selectors.DefaultSelector):
    """Lets the time pass that it should have waited."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits for what never happens"
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def in_virtual_time(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """The result of a coroutine; `asyncio.get_running_loop().time()` is its clock, seconds from 0."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work())
