"""A block of a tensor: what one rank holds of it, and what one file does."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Where a block lies in its tensor.

    Attributes:
        whole: shape of the tensor.
        offset: of the block's first value, along each dimension.
        shape: of the block.
    """

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def all_of(cls, shape: tuple[int, ...]) -> "Block":
        """The tensor itself."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    def common(self, other: "Block") -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """What two blocks of one tensor share, as a part of this one and as a part of the other; None where that is nothing.

        >>> Block((8,), (0,), (5,)).common(Block((8,), (3,), (5,)))
        ((slice(3, 5, None),), (slice(0, 2, None),))
        """
        ours, theirs = [], []
        for start, size, other_start, other_size in zip(
            self.offset, self.shape, other.offset, other.shape, strict=True
        ):
            low, high = max(start, other_start), min(start + size, other_start + other_size)
            if low >= high:
                return None
            ours.append(slice(low - start, high - start))
            theirs.append(slice(low - other_start, high - other_start))
        return tuple(ours), tuple(theirs)
