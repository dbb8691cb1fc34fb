"""The only place that knows staleness: how many batches may be under way, and which are too old to train on.

    producer   waits in `slot()` until a batch may be started, then calls `put()`
    consumer   waits in `get()` for a batch
    unblocked  the producer by `weights_live()`, that is by a finished weight push; the consumer by `put()`

With max_staleness S there are S + 1 slots, and a slot is free again only when newer weights are live, so no
sample is born too old: the batch trained at version v was started at version v - S or later. S = 0 makes
rollout, training and push take turns.
"""

import asyncio
from typing import Generic, TypeVar

from services.errors import PeerError

Batch = TypeVar("Batch")


class StalenessBuffer(Generic[Batch]):
    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self._slots = asyncio.Semaphore(max_staleness + 1)
        self._queue: asyncio.Queue[tuple[int, Batch]] = asyncio.Queue()
        self.version = 0
        """Version of the weights that are live."""

    async def slot(self) -> None:
        """Wait until a batch may be started."""
        await self._slots.acquire()

    def put(self, batch: Batch, policy_version: int) -> None:
        """Hand over a batch whose oldest token was sampled under `policy_version`."""
        self._queue.put_nowait((policy_version, batch))

    async def get(self) -> tuple[Batch, int]:
        """The next batch and its staleness in steps, checked once more at consumption.

        Raises:
            PeerError: a server has sampled under weights that were no longer, or not yet, live.
        """
        policy_version, batch = await self._queue.get()
        staleness = self.version - policy_version
        if not 0 <= staleness <= self._max_staleness:
            raise PeerError(
                f"a rollout server sampled under version {policy_version} for a step that starts from version {self.version}"
            )
        return batch, staleness

    def weights_live(self, version: int) -> None:
        """Newer weights serve: one more batch may be started."""
        self.version = version
        self._slots.release()
