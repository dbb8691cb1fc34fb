"""All rows of a source, checked by their columns; which of them are used.

    consumes   a RowTable
    produces   the indices of the rows that are used, of each the key of its question, and the counts of what is not used

Of a source of many rows the result is kept in the cache of `datasets`, by the source's fingerprint and the options that matter.
"""

import dataclasses
import hashlib
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from services.errors import DataError
from services.models.text import longest_token
from trainer.data.filters import failed_filter
from trainer.data.rows import RowReader
from trainer.data.tables import Batch, RowTable

logger = logging.getLogger(__name__)

_VERSION = "2"  # of what `_check_batch` says of a row: raise it with every change there
_FEATURES = datasets.Features(
    {
        name: datasets.Value(kind)
        for name, kind in dict(
            key="int64", teacher="string", reason="string", filter="string", columns="string"
        ).items()
    }
)
_OPTIONS = (
    *("prompt_column", "messages_column", "answer_column", "teacher_column"),
    *("last_assistant_turn", "chat_template_kwargs", "max_prompt_tokens", "filters"),
)
"""Of DataConfig: what `_check_batch` looks at."""


@dataclass(frozen=True)
class CheckedRows:
    """Rows of a source that are used as far as their columns tell.

    Attributes:
        indices: [N] int64, 0-based in the table.
        keys: [N] int64 of the questions; equal for equal ones.
        teachers: names that rows give; None is in it if one gives none.
        columns: names of all columns that any row has besides its question.
        skipped: reasons of bad rows by 1-based number.
        filtered: rows that each filter left out, by its column.
    """

    table: RowTable
    indices: np.ndarray
    keys: np.ndarray
    teachers: set[str | None]
    columns: set[str]
    skipped: dict[int, str]
    filtered: dict[str, int]

    def holding_out(self, share: float, seed: int) -> tuple["CheckedRows", "CheckedRows"]:
        """(rows to train on, rows held out): `share` of the questions, or from 1 on as many.

        Raises:
            DataError: nothing would be left to train on.
        """
        distinct, first = np.unique(self.keys, return_index=True)
        order = np.sort(first)  # the choice depends on the order of the file, not on the values of the keys
        count = max(1, round(share * len(distinct))) if share < 1 else int(share)
        if count >= len(distinct):
            raise DataError(
                f"data.held_out = {share:g} of {self.table.name} leaves nothing to train on: it has {len(distinct)} different "
                "prompts; hold out fewer"
            )
        chosen = np.sort(order[random.Random(f"{seed}-held-out").sample(range(len(order)), count)])
        return self.without_keys(self.keys[chosen]), self._at(chosen)

    def without_keys(self, keys: np.ndarray) -> "CheckedRows":
        """The rows that ask none of these questions."""
        return self._at(np.flatnonzero(~np.isin(self.keys, keys)))

    def _at(self, places: np.ndarray) -> "CheckedRows":
        return replace(self, indices=self.indices[places], keys=self.keys[places])

    def log_filters(self) -> None:
        """Count in the log what the filters left out."""
        if self.filtered:
            each = ", ".join(f"{column}: {count}" for column, count in sorted(self.filtered.items()))
            logger.info(
                "%s: data.filters leave out %d of %d rows (%s)",
                *(self.table.name, sum(self.filtered.values()), len(self.table), each),
            )


def check_rows(table: RowTable, reader: RowReader, *, is_cached: bool) -> CheckedRows:
    """Check the columns of every row.

    Args:
        is_cached: keep the result in the cache of `datasets`, or take it from there.

    Raises:
        DataError: a row is bad, and `reader.config.on_bad_row` is "stop"; names file, row and reason.
    """
    results = _mapped(table, reader, is_cached=is_cached)
    columns = datasets.concatenate_datasets(results).data if results else _FEATURES.arrow_schema.empty_table()
    skipped = {}
    is_bad = pc.is_valid(columns["reason"]).to_numpy()
    for index in np.flatnonzero(is_bad).tolist():
        reason = columns["reason"][index].as_py()
        if reader.config.on_bad_row == "stop":
            raise bad_row(table, index, reason)
        skipped[table.number(index)] = reason
    kept = np.flatnonzero(~is_bad & pc.is_null(columns["filter"]).to_numpy())
    filtered = {one["values"]: one["counts"] for one in pc.value_counts(columns["filter"].drop_null()).to_pylist()}
    teachers = set(pc.unique(columns["teacher"].take(kept)).to_pylist())
    of_rows = pc.unique(columns["columns"].take(kept)).to_pylist()
    names = {name for of_row in of_rows for name in json.loads(of_row)}
    return CheckedRows(table, kept, columns["key"].take(kept).to_numpy(), teachers, names, skipped, filtered)


def bad_row(table: RowTable, index: int, reason: str) -> DataError:
    """The error that names file, row, reason and what to do."""
    path, row = table.locate(index)
    return DataError(f"{path}, row {row}: {reason}; fix the row or pass --data.on_bad_row skip")


def _mapped(table: RowTable, reader: RowReader, *, is_cached: bool) -> list[Dataset]:
    def check(contents: Iterator[dict[str, Any] | DataError], start: int) -> Batch:
        return _check_batch(table, reader, contents, start)

    options: dict[str, Any] = {"features": _FEATURES}
    if is_cached:
        folder, name = datasets.config.HF_DATASETS_CACHE / "distillserve" / "checked", _fingerprint(table, reader)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return table.map(
                check, **options, new_fingerprint=f"{name}-{{part}}", cache_file_name=f"{folder}/{name}-{{part}}.arrow"
            )
        except (OSError, pa.ArrowException) as error:  # not writable, full, or a file that is broken
            logger.warning(
                "%s is checked at every start: the cache of its result in %s cannot be used (%s)",
                table.name,
                folder,
                error,
            )
    return table.map(check, **options, keep_in_memory=True, new_fingerprint="checked-{part}")


def _fingerprint(table: RowTable, reader: RowReader) -> str:
    """Of what the check depends on: the rows, the options, what is known of student and tokenizer."""
    said = [
        *(_VERSION, [part.dataset._fingerprint for part in table.parts], [part.is_text for part in table.parts]),
        *(reader.config.model_dump(include={*_OPTIONS}), sorted(reader.teachers), dataclasses.asdict(reader.limits)),
        *(longest_token(reader.tokenizer), reader.tokenizer.chat_template is None),
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _check_batch(
    table: RowTable, reader: RowReader, contents: Iterator[dict[str, Any] | DataError], start: int
) -> Batch:
    results: Batch = {name: [] for name in _FEATURES}
    for index, content in enumerate(contents, start):
        key, teacher, reason, filtered, names = 0, None, None, None, None
        try:
            if isinstance(content, DataError):
                raise content
            filtered = failed_filter(content, reader.config.filters)
            if filtered is None:
                checked = reader.check(content)
                key, teacher = checked.key(), checked.teacher
                names = json.dumps(sorted(checked.names(reader.config)))
        except DataError as error:
            reason = str(error)
            if reader.config.on_bad_row == "stop":
                raise bad_row(table, index, reason) from error
        for name, value in zip(results, (key, teacher, reason, filtered, names), strict=True):
            results[name].append(value)
    return results
