"""The only place that knows staleness: how many batches may be under way, and which groups are too old to train on.

    producer   waits in `slot()` until a batch may be started, then calls `put()`
    consumer   waits in `get()` for a batch, and for the groups of it that are made again
    woken      the producer by `weights_live()`, that is by a finished weight push; the consumer by `put()`

With max_staleness S there are S + 1 slots, and a slot is free again only when newer weights are live, so no
sample is born too old: the batch trained at version v was started at version v - S or later. S = 0 makes
rollout, training and push take turns. What is too old all the same, since its server held older weights than it should, is
dropped by `get` and made again under the live version.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from typing import Generic, Protocol, TypeVar

from services.errors import PeerError

_MOST_RENEWALS = 2


class Aged(Protocol):
    """A batch of groups."""

    def versions(self) -> Sequence[Collection[int]]:
        """For each of its groups those of the oldest tokens of its completions."""

    async def renew(self, places: list[int]) -> None:
        """Drop the groups at these places, and make them again in the same places."""


Batch = TypeVar("Batch", bound=Aged)


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
        self._batches: deque[Batch] = deque()
        self._has_batch = asyncio.Event()
        self._version = -1  # of the weights that are live; a run pushes version 0 first

    async def slot(self) -> None:
        """Wait until a batch may be started."""
        await self._slots.acquire()

    def put(self, batch: Batch) -> None:
        """Hand over a batch."""
        self._batches.append(batch)
        self._has_batch.set()

    async def get(self) -> Batch:
        """The next batch, no group of which is too old; the age is checked here, for the slots bound only when it was begun.

        Who is cancelled here has lost nothing: the next call returns the same batch.

        Raises:
            PeerError: groups are too old again and again: a server samples under weights that are no longer, or not yet, live.
        """
        await self._has_batch.wait()
        batch = self._batches[0]
        for _ in range(_MOST_RENEWALS):
            if not (stale := self._stale(batch)):
                break
            await batch.renew(stale)
        if stale := self._stale(batch):
            sampled = next(v for v in batch.versions()[stale[0]] if not self._is_fresh(v))
            raise PeerError(
                f"a rollout server sampled under version {sampled} for a step that starts from version {self._version}"
            )
        self._batches.popleft()
        if not self._batches:
            self._has_batch.clear()
        return batch

    def _stale(self, batch: Batch) -> list[int]:
        """Places of the groups that may not be trained on."""
        return [place for place, own in enumerate(batch.versions()) if not all(map(self._is_fresh, own))]

    def _is_fresh(self, version: int) -> bool:
        return 0 <= self._version - version <= self._max_staleness

    def weights_live(self, version: int) -> None:
        """Weights serve; if they are newer ones, one more batch may be started."""
        if version > self._version:
            self._version = version
            self._slots.release()
