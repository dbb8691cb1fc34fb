"""The gate of `/v1/rollouts`: while weights change nothing is handed to the engine, whoever asks.

vLLM's own pause queues what comes meanwhile, but data-parallel engines step together and hang on a request that reaches one
of them between its pause and its resume. So requests wait here, and the engine is paused once it has nothing to do.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.errors import RequestError


class Admission:
    """Counts what the engine works on, and lets it run dry."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Wait for the gate; inside the block one completion is in flight."""
        while not self._open.is_set():  # it may be shut again before its waiters run
            await self._open.wait()
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()

    async def close(self, drain_s: float) -> None:
        """Admit nothing more, and wait until what is in flight has ended.

        Raises:
            RequestError: it has not within `drain_s`; the gate is open again.
        """
        self._open.clear()
        try:
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        except TimeoutError as error:
            self._open.set()
            raise RequestError(
                504,
                "Not drained",
                f"{self.in_flight} completions were still in flight {drain_s:.0f} s after the pause; ask for shorter ones "
                "(sampling.max_new_tokens) or raise weight_sync.stage_timeout_s",
            ) from error
        except BaseException:
            self._open.set()
            raise

    def open(self) -> None:
        """Admit what waits and what comes."""
        self._open.set()
