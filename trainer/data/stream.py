"""The order in which rows are used: seeded, new in every epoch."""

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

Row = TypeVar("Row")


class RowStream(Generic[Row]):
    """Rows without end; the next position is all its state."""

    def __init__(self, rows: Sequence[Row], *, seed: int, shuffle: bool) -> None:
        self._rows, self._seed, self._shuffle = rows, seed, shuffle
        self.position = 0

    def take(self, count: int) -> list[Row]:
        """The next `count` rows; a batch may span two epochs."""
        batch: list[Row] = []
        while len(batch) < count:
            epoch, offset = divmod(self.position, len(self._rows))
            order = self._order(epoch)
            batch.append(self._rows[order[offset]])
            self.position += 1
        return batch

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_cached_epoch", None) != epoch:
            self._cached_epoch = epoch
            self._cached_order = list(range(len(self._rows)))
            if self._shuffle:
                random.Random(f"{self._seed}-{epoch}").shuffle(self._cached_order)
        return self._cached_order
