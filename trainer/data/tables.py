"""Rows where they are: `datasets` maps them into memory, and one is read when it is asked for.

Part       a Dataset, and what a user calls it: its file
RowTable   all parts of one source; says of a row in which file it is, and where there
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from datasets import Dataset

from services.errors import DataError
from services.strict_json import parse_object

Batch = dict[str, list[Any]]
"""What `datasets` gives for a slice of rows: the values of each column."""


@dataclass(frozen=True)
class Part:
    """Rows of one file, folder or object.

    Attributes:
        name: of the file, for messages.
        is_text: the columns are those of `line_cache.FEATURES`; otherwise they are the user's.
    """

    name: str
    dataset: Dataset
    is_text: bool

    def contents(self, batch: Batch) -> Iterator[dict[str, Any] | DataError]:
        """The rows of a slice; in place of one that is no JSON object, why it is none."""
        if not self.is_text:
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield {name: without_nulls(value) for name, value in zip(names, values, strict=True)}
            return
        for text in batch["text"]:
            try:
                yield parse_object(text)
            except DataError as error:
                yield error


def without_nulls(value: Any) -> Any:
    """A value of a column without the nulls with which Arrow fills up what one of its structs does not have."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


class RowTable:
    """The rows of a source, by 0-based index.

    Args:
        name: what the option that names the source says.
    """

    def __init__(self, name: str, parts: list[Part]) -> None:
        self.name, self.parts = name, parts
        self._starts = [0, *accumulate(len(part.dataset) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, index: int) -> tuple[str, int]:
        """The file of a row and its 1-based number there."""
        part, place = self._find(index)
        return part.name, part.dataset.data["row"][place].as_py() if part.is_text else place + 1

    def number(self, index: int) -> int:
        """The 1-based number of a row: in its file, or where there are several, in all of them."""
        return self.locate(index)[1] if len(self.parts) == 1 else index + 1

    def read(self, index: int) -> dict[str, Any]:
        """A row.

        Raises:
            DataError: it is no JSON object.
        """
        part, place = self._find(index)
        (content,) = part.contents(part.dataset[place : place + 1])
        if isinstance(content, DataError):
            raise content
        return content

    def map(
        self, function: Callable[[Iterator[dict[str, Any] | DataError], int], Batch], **options: Any
    ) -> list[Dataset]:
        """`Dataset.map` over each part: `function` gets the rows of a slice and the index of the first one.

        Args:
            options: of `Dataset.map`; `new_fingerprint` and `cache_file_name` are completed by the part.
        """
        results = []
        for number, (part, start) in enumerate(zip(self.parts, self._starts, strict=False)):
            if len(part.dataset) == 0:  # `datasets` would not make the new columns
                continue

            def of_part(batch: Batch, indices: list[int], part: Part = part, start: int = start) -> Batch:
                return function(part.contents(batch), start + indices[0])

            completed = {
                name: value.format(part=number) if isinstance(value, str) else value for name, value in options.items()
            }
            results.append(
                part.dataset.map(
                    of_part, batched=True, with_indices=True, remove_columns=part.dataset.column_names, **completed
                )
            )
        return results

    def _find(self, index: int) -> tuple[Part, int]:
        number = bisect_right(self._starts, index) - 1
        return self.parts[number], index - self._starts[number]
