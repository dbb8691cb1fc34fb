"""Large text files as Arrow, in the cache of `datasets`: converted once, then mapped into memory.

The key is the file's content, so that a file that was changed, moved or copied is never taken for another one. `datasets` locks
the folder while it is written and renames it when it is whole: runs that start at once share one conversion, and one that was
killed leaves nothing behind that is read.
"""

from collections.abc import Iterator
from typing import Any

import blake3
import datasets
import pyarrow as pa
from datasets.builder import ArrowBasedBuilder, Key

from services.errors import DataError
from trainer.data.lines import read_row_texts

FEATURES = datasets.Features({"row": datasets.Value("int64"), "text": datasets.Value("large_string")})
"""`row`: 1-based line of the file; `text`: the row as JSON."""

_VERSION = "1"  # of what `read_row_texts` makes of a file: raise it with every change there
_BATCH_ROWS, _BATCH_CHARACTERS = 10_000, 16 << 20
_READ_BYTES = 4 << 20


def read_tables(path: str, option: str) -> Iterator[pa.Table]:
    """The rows of a text file in parts that fit in memory, in the schema of FEATURES.

    Raises:
        DataError: as `read_row_texts`.
    """
    rows: list[int] = []
    texts: list[str] = []
    size = 0
    for row, text in read_row_texts(path, option):
        rows.append(row)
        texts.append(text)
        size += len(text)
        if len(rows) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
            yield _table(rows, texts)
            rows, texts, size = [], [], 0
    yield _table(rows, texts)


def _table(rows: list[int], texts: list[str]) -> pa.Table:
    return pa.table({"row": rows, "text": texts}, schema=FEATURES.arrow_schema)


class TextRows(ArrowBasedBuilder):
    """What `datasets` calls to fill its cache."""

    BUILDER_CONFIG_CLASS = datasets.BuilderConfig

    def __init__(self, path: str, option: str) -> None:
        self._path, self._option = path, option
        super().__init__(dataset_name="distillserve", config_name=f"rows-{digest(path, option)}", hash=_VERSION)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train", gen_kwargs={})]

    def _generate_shards(self) -> Iterator[str]:
        yield self._path

    def _generate_tables(self) -> Iterator[tuple[Key, pa.Table]]:
        for place, table in enumerate(read_tables(self._path, self._option)):
            yield Key(0, place), table


def digest(path: str, option: str) -> str:
    """Of a file's content and of what its name says of the format.

    Raises:
        DataError: the file cannot be read.
    """
    hasher = blake3.blake3()
    try:
        with open(path, "rb") as file:  # not mapped: the pages would count as this process's memory
            while block := file.read(_READ_BYTES):
                hasher.update(block)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; {option} is a file") from error
    kind = path.lower().rpartition(".")[2] if path.lower().endswith((".csv", ".tsv", ".json")) else "jsonl"
    return f"{kind}-{hasher.hexdigest(16)}"
