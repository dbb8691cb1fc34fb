"""The order in which rows are used: seeded, new in every epoch; of several sources, mixed by weight.

A position is one whole number, the rows that were looked at, and all the state there is: a stream that is given the position of
another one goes on as that would have.
"""

import random
from array import array
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from typing import Generic, TypeVar

from services.errors import DataError

Row = TypeVar("Row")

MIXING_BLOCK = 1024
"""Rows of all sources over which weights are exact to one row."""


class RowStream(Generic[Row]):
    """Rows without end.

    Args:
        rows: None among them is a row that is left out; it has a position as well.
    """

    def __init__(self, rows: Sequence[Row | None], *, seed: int, shuffle: bool) -> None:
        self._rows, self._seed, self._shuffle = rows, seed, shuffle
        self.position = 0

    def take(self, count: int) -> list[Row]:
        """The next `count` rows; a batch may span two epochs.

        Raises:
            DataError: a row is bad and not to be skipped, or all rows of a source are left out.
        """
        return [row for _, row in self.take_placed(count)]

    def take_placed(self, count: int) -> list[tuple[int, Row]]:
        """As `take`, each row with its position."""
        batch: list[tuple[int, Row]] = []
        num_left_out = 0
        while len(batch) < count:
            row = self.at(self.position)
            self.position += 1
            if row is not None:
                batch.append((self.position - 1, row))
                num_left_out = 0
            elif (num_left_out := num_left_out + 1) >= 2 * self.period:
                raise DataError(
                    f"none of {self.period} rows of the data can be used; see the warnings about skipped rows"
                )
        return batch

    @property
    def period(self) -> int:
        """Positions in which every row has had a turn."""
        return len(self._rows)

    def at(self, position: int) -> Row | None:
        """The row at a position, or None where it is left out."""
        epoch, offset = divmod(position, len(self._rows))
        return self._rows[self._order(epoch)[offset]]

    def _order(self, epoch: int) -> MutableSequence[int]:
        if getattr(self, "_cached_epoch", None) != epoch:
            self._cached_epoch = epoch
            self._cached_order = array("q", range(len(self._rows)))
            if self._shuffle:
                random.Random(f"{self._seed}-{epoch}").shuffle(self._cached_order)
        return self._cached_order


class MixedStream(RowStream[Row]):
    """Several streams in one, evenly spread: of MIXING_BLOCK positions each has its part, at least one.

    Args:
        streams: of the sources; each has its own order and its own epochs.
        weights: how often the rows of each are used, against each other.
    """

    def __init__(self, streams: list[RowStream[Row]], weights: list[float]) -> None:
        self._streams = streams
        self._counts = _apportion(weights, MIXING_BLOCK)
        slots = [((turn + 0.5) / count, source) for source, count in enumerate(self._counts) for turn in range(count)]
        seen = [0] * len(streams)
        self._turns: list[tuple[int, int]] = []  # of each slot of a block: the source, and which of its turns this is
        for _, source in sorted(slots):
            self._turns.append((source, seen[source]))
            seen[source] += 1
        self.position = 0

    @property
    def period(self) -> int:
        blocks = (-(-stream.period // count) for stream, count in zip(self._streams, self._counts, strict=True))
        return max(blocks) * len(self._turns)

    def at(self, position: int) -> Row | None:
        block, slot = divmod(position, len(self._turns))
        source, turn = self._turns[slot]
        return self._streams[source].at(block * self._counts[source] + turn)


def _apportion(weights: list[float], total: int) -> list[int]:
    """Whole numbers in the proportion of `weights` whose sum is `total`, each at least 1 (largest remainders)."""
    spare, whole = total - len(weights), sum(weights)
    exact = [spare * weight / whole for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: spare - sum(counts)]:
        counts[i] += 1
    return [count + 1 for count in counts]


class IteratedStream(RowStream[Row]):
    """Rows that can only be read one after another.

    Args:
        read: the rows from a position on, without end; earlier ones are read and dropped.
    """

    period = 1_000_000  # rows in a row that may be left out, where nothing tells how many there are

    def __init__(self, read: Callable[[int], Iterator[Row | None]]) -> None:
        self._read = read
        self._next_position: int | None = None
        self.position = 0

    def at(self, position: int) -> Row | None:
        if position != self._next_position:
            self._iterator = self._read(position)
        self._next_position = None  # an error leaves an iterator that has ended
        row = next(self._iterator)
        self._next_position = position + 1
        return row
