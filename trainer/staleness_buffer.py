"""The only place that knows staleness: how many batches may be under way, and which are too old to train on.

    producer   waits in `slot()` until a batch may be started, then calls `put()`
    consumer   waits in `get()` for a batch
    woken      the producer by `weights_live()`, that is by a finished weight push; the consumer by `put()`

With max_staleness S there are S + 1 slots, and a slot is free again only when newer weights are live, so no
sample is born too old: the batch trained at version v was started at version v - S or later. S = 0 makes
rollout, training and push take turns.
"""

import asyncio
from collections.abc import Collection
from typing import Generic, TypeVar

from services.errors import PeerError

Batch = TypeVar("Batch")


def staleness(policy_versions: Collection[int], version: int) -> int:
    """How many steps the oldest completion of a batch is behind the weights that a step starts from; 0 for none at all.

    Args:
        policy_versions: of the oldest token of each completion.
        version: of the weights.
    """
    return int(version - min(policy_versions, default=version))


class StalenessBuffer(Generic[Batch]):
    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self._slots = asyncio.Semaphore(max_staleness)
        self._queue: asyncio.Queue[tuple[Collection[int], Batch]] = asyncio.Queue()
        self._version = -1  # of the weights that are live; a run pushes version 0 first

    async def slot(self) -> None:
        """Wait until a batch may be started."""
        await self._slots.acquire()

    def put(self, batch: Batch, policy_versions: Collection[int]) -> None:
        """Hand over a batch whose completions are of these versions, each that of its oldest token."""
        self._queue.put_nowait((policy_versions, batch))

    async def get(self) -> Batch:
        """The next batch; its age is checked here, for the slots bound only when it was begun.

        Raises:
            PeerError: a server has sampled under weights that were no longer, or not yet, live.
        """
        policy_versions, batch = await self._queue.get()
        for sampled in set(policy_versions):
            if not 0 <= self._version - sampled <= self._max_staleness:
                raise PeerError(
                    f"a rollout server sampled under version {sampled} for a step that starts from version {self._version}"
                )
        return batch

    def weights_live(self, version: int) -> None:
        """Weights serve: newer ones than before, and one more batch may be started; or the same once more."""
        if version > self._version:
            self._slots.release()
        self._version = version
