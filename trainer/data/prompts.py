"""Sources of prompts to token ids.

    consumes   what trainer/data/sources.py opens: files, folders, data sets of the hub, objects
    produces   Prompt objects; extra columns ride along

The columns of all rows are checked at start, so that a bad row is reported before anything is trained. The rows of a source of up
to data.tokenize_at_start are tokenised then as well. Of more rows each is tokenised when its turn comes, and one that turns out to
be bad only then (too many tokens, refused by the chat template) does what data.on_bad_row says.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, overload

import blake3
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from services.config import DataConfig
from services.errors import DataError
from trainer.data.checked_rows import CheckedRows, bad_row, check_rows
from trainer.data.filters import failed_filter
from trainer.data.rows import Prompt, RowReader
from trainer.data.sources import Source, open_table, quiet_datasets, table_of
from trainer.data.tables import without_nulls
from trainer.data.text_limits import NO_LIMITS, TextLimits

__all__ = ["Prompt", "PromptRows", "check_source", "first_prompts", "read_prompts"]

logger = logging.getLogger(__name__)

Reason = Callable[[Prompt], str | None]
"""Why a prompt cannot be used, or None."""


class LatePrompts(Sequence["Prompt | None"]):
    """Rows that are read and tokenised when they are asked for; None stands for one that is left out.

    Args:
        checks: what else may be wrong with a prompt.
    """

    def __init__(self, rows: CheckedRows, reader: RowReader, checks: tuple[Reason, ...] = ()) -> None:
        self._rows, self._reader, self._checks = rows, reader, checks
        self._left_out = _LeftOut(rows.table.name)

    def __len__(self) -> int:
        return len(self._rows.indices)

    @overload
    def __getitem__(self, place: int) -> Prompt | None: ...
    @overload
    def __getitem__(self, place: slice) -> list[Prompt | None]: ...
    def __getitem__(self, place: int | slice) -> Prompt | list[Prompt | None] | None:
        """A row of the data.

        Raises:
            DataError: it is bad, and data.on_bad_row is "stop"; names file, row and reason.
        """
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        index, config = int(self._rows.indices[place]), self._reader.config
        try:
            number, content = self._rows.table.number(index), self._rows.table.read(index)
            prompt = encode_checked(self._reader, number, content, self._checks)
        except DataError as error:
            if config.on_bad_row == "stop":
                raise bad_row(self._rows.table, index, str(error)) from error
            self._left_out.add("{}, row {}: {}".format(*self._rows.table.locate(index), error))
            return None
        if prompt is None:
            self._left_out.add(None)
        return prompt

    def fingerprint(self) -> str:
        """Of the questions, and of which rows of the source they are."""
        return blake3.blake3(self._rows.indices.tobytes() + self._rows.keys.tobytes()).hexdigest(16)

    def checked_by(self, reason: Reason) -> "LatePrompts":
        return LatePrompts(self._rows, self._reader, (*self._checks, reason))


class StreamedPrompts:
    """Rows of an IterableDataset, epoch after epoch; None stands for one that is left out."""

    def __init__(self, dataset: IterableDataset, name: str, reader: RowReader, checks: tuple[Reason, ...] = ()) -> None:
        self._dataset, self._name, self._reader, self._checks = dataset, name, reader, checks
        self._left_out = _LeftOut(name)

    def from_position(self, position: int) -> Iterator[Prompt | None]:
        """What comes after `position` rows.

        Raises:
            DataError: a row is bad, and data.on_bad_row is "stop", or there are no rows.
        """
        epoch, row = 0, 0
        while True:
            self._dataset.set_epoch(epoch)
            before = row
            for content in self._dataset:
                row += 1
                if row > position:
                    yield self._prompt(row - before, content)
            if row == before:
                raise DataError(f"{self._name} holds no row")
            epoch += 1

    def _prompt(self, row: int, content: dict[str, object]) -> Prompt | None:
        content, config = {name: without_nulls(value) for name, value in content.items()}, self._reader.config
        if failed_filter(content, config.filters) is not None:
            self._left_out.add(None)
            return None
        try:
            prompt = encode_checked(self._reader, row, content, self._checks)
        except DataError as error:
            if config.on_bad_row == "stop":
                raise DataError(
                    f"{self._name}, row {row}: {error}; fix the row or pass --data.on_bad_row skip"
                ) from error
            self._left_out.add(f"{self._name}, row {row}: {error}")
            return None
        if prompt is None:
            self._left_out.add(None)
        return prompt

    def checked_by(self, reason: Reason) -> "StreamedPrompts":
        return StreamedPrompts(self._dataset, self._name, self._reader, (*self._checks, reason))


def is_filtered(prompt: Prompt, config: DataConfig) -> bool:
    """Whether data.filter_max_prompt_tokens leaves a prompt out."""
    most = config.filter_max_prompt_tokens
    return most is not None and len(prompt.token_ids) > most


def encode_checked(
    reader: RowReader, number: int, content: dict[str, Any], checks: tuple[Reason, ...]
) -> Prompt | None:
    """A row as a prompt; None where data.filter_max_prompt_tokens leaves it out.

    Raises:
        DataError: the row is bad, or the first reason that a check gives.
    """
    prompt = reader.encode(number, content)
    if is_filtered(prompt, reader.config):
        return None
    for check in checks:
        if (why := check(prompt)) is not None:
            raise DataError(why)
    return prompt


class _LeftOut:
    """Counts rows that are left out in the middle of a run, and says so at the first, the tenth, the hundredth, ..."""

    def __init__(self, name: str) -> None:
        self._name, self._num_bad, self._num_filtered = name, 0, 0

    def add(self, bad: str | None) -> None:
        """`bad`: where a bad row is and why it is one; None: it is filtered."""
        self._num_bad += bad is not None
        self._num_filtered += bad is None
        if bad is not None and _is_power_of_ten(self._num_bad):
            logger.warning("%s: skipped %d rows so far, the last one: %s", self._name, self._num_bad, bad)
        if bad is None and _is_power_of_ten(self._num_filtered):
            logger.info("%s: filters have left out %d rows so far", self._name, self._num_filtered)


def _is_power_of_ten(number: int) -> bool:
    return str(number).rstrip("0") == "1"


@dataclass(frozen=True)
class PromptRows:
    """The rows of a source before it is known how long a prompt may be."""

    path: str
    config: DataConfig
    prompts: Sequence[Prompt | None] | StreamedPrompts
    """Tokenised, or of many rows LatePrompts."""
    skipped: dict[int, str]
    """Reasons by row."""
    num_filtered: int = 0
    """Rows that filters left out."""
    teachers: set[str | None] = field(default_factory=set)
    """What rows call their teachers; None is in it if one names none."""
    columns: set[str] | None = None
    """Names of all columns that any row has besides its question; None where that shows only when rows come."""

    def fitting(self, max_prompt_tokens: int) -> Sequence[Prompt | None] | StreamedPrompts:
        """The prompts of at most that many tokens; `config.max_prompt_tokens` lowers it further.

        Raises:
            DataError: a prompt is longer (unless `config.on_bad_row` is "skip"), or none is left.
        """
        limit = min(max_prompt_tokens, self.config.max_prompt_tokens or max_prompt_tokens)

        def reason(prompt: Prompt) -> str | None:
            length = len(prompt.token_ids)
            return (
                f"the prompt has {length} tokens, more than the {limit} that leave room to answer"
                if length > limit
                else None
            )

        return self.without(reason).used()

    def without(self, reason: Reason) -> "PromptRows":
        """The rows for which there is no reason to leave them out; of rows that are not tokenised yet it is found later.

        Raises:
            DataError: there is one, unless `config.on_bad_row` is "skip".
        """
        if isinstance(self.prompts, LatePrompts | StreamedPrompts):
            return replace(self, prompts=self.prompts.checked_by(reason))
        prompts, skipped = [], dict(self.skipped)
        for prompt in self.prompts:
            assert prompt is not None
            if (why := reason(prompt)) is None:
                prompts.append(prompt)
            else:
                stop_or_skip(self.path, prompt.row, why, self.config, skipped)
        return replace(self, prompts=prompts, skipped=skipped)

    def used(self) -> Sequence[Prompt | None] | StreamedPrompts:
        """The prompts; what was skipped is said.

        Raises:
            DataError: there is none.
        """
        if isinstance(self.prompts, StreamedPrompts):
            return self.prompts
        warn_of_skipped(self.path, self.skipped, len(self.skipped) + len(self.prompts))
        if not self.prompts:
            wanted = f"`{self.config.prompt_column}` or `{self.config.messages_column}`"
            filtered = f"; filters leave out {self.num_filtered} rows" if self.num_filtered else ""
            raise DataError(f"{self.path} holds no usable row; a row is a JSON object with {wanted}{filtered}")
        return self.prompts


def read_prompts(
    source: str | Source | Dataset | IterableDataset,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    option: str = "data.path",
    teachers: Collection[str] = (),
    limits: TextLimits = NO_LIMITS,
) -> PromptRows:
    """Read and tokenise a source, or prepare that where it has many rows.

    Args:
        source: as `option` gives it, or an object.
        teachers: names that `config.teacher_column` may hold; without any it is a column like others.
        limits: what the student can take.

    Raises:
        DataError: the source cannot be read, or (unless `config.on_bad_row` is "skip") a row is bad; the message names file,
            row and reason.
    """
    reader = RowReader(config, tokenizer, teachers, limits)
    if isinstance(source, IterableDataset):
        known = {None, *teachers}
        return PromptRows(option, config, StreamedPrompts(source.with_format(None), option, reader), {}, 0, known)
    return encode_rows(check_source(source, reader, option), reader)


def check_source(source: str | Source | Dataset, reader: RowReader, option: str) -> CheckedRows:
    """Open a source and check the columns of its rows.

    Raises:
        DataError: as `read_prompts`.
    """
    with quiet_datasets():
        if not isinstance(source, str | Source | Dataset):
            raise DataError(f"{option} is a {type(source).__name__}; give {_instead_of(source)}")
        if isinstance(source, Dataset):
            table = table_of(source, option)
        else:
            table = open_table(source_of(source, reader.config, option) if isinstance(source, str) else source)
        checked = check_rows(table, reader, is_cached=len(table) > reader.config.tokenize_at_start)
    checked.log_filters()
    return checked


def _instead_of(source: object) -> str:
    if isinstance(source, dict):
        return "one of its splits, e.g. dataset['train']"
    return "a datasets.Dataset" if isinstance(source, IterableDataset) else "a datasets.Dataset or IterableDataset"


def source_of(path: str, config: DataConfig, option: str) -> Source:
    """What `option` names: data.path has options of its own beside it, a part of which a data set on the hub needs elsewhere."""
    is_main = path == config.path
    hub = {"config_name": config.config_name, "revision": config.revision} if is_main else {}
    if option == "data.path":
        return Source(path, option, config.split, "data.split", **hub)
    if option == "data.eval_path":
        return Source(path, option, config.eval_split, "data.eval_split", **hub)
    return Source(path, option)


def encode_rows(rows: CheckedRows, reader: RowReader) -> PromptRows:
    """Tokenise checked rows, or prepare that where they are many.

    Raises:
        DataError: a row is bad, unless data.on_bad_row is "skip".
    """
    name, config, filtered = rows.table.name, reader.config, sum(rows.filtered.values())
    if len(rows.indices) > config.tokenize_at_start:
        logger.info("%s: its %d rows are tokenised when their turn comes", name, len(rows.indices))
        return PromptRows(name, config, LatePrompts(rows, reader), rows.skipped, filtered, rows.teachers, rows.columns)
    prompts: list[Prompt] = []
    skipped, num_filtered = dict(rows.skipped), 0
    for index in rows.indices.tolist():
        number = rows.table.number(index)
        try:
            prompt = reader.encode(number, rows.table.read(index))
        except DataError as error:
            if config.on_bad_row == "stop":
                raise bad_row(rows.table, index, str(error)) from error
            skipped[number] = str(error)
            continue
        num_filtered += is_filtered(prompt, config)
        if not is_filtered(prompt, config):
            prompts.append(prompt)
    if num_filtered:
        logger.info("%s: data.filter_max_prompt_tokens leaves out %d rows", name, num_filtered)
    return PromptRows(name, config, prompts, skipped, filtered + num_filtered, rows.teachers, rows.columns)


def first_prompts(prompts: Sequence[Prompt | None] | StreamedPrompts, count: int | None) -> list[Prompt]:
    """The first `count` prompts that are not left out, or all of them."""
    rows = prompts.from_position(0) if isinstance(prompts, StreamedPrompts) else prompts
    return list(islice((prompt for prompt in rows if prompt is not None), count))


def stop_or_skip(path: str, row: int, reason: str, config: DataConfig, skipped: dict[int, str]) -> None:
    """What `config.on_bad_row` says about a bad row: note its reason in `skipped`, or stop.

    Raises:
        DataError: bad rows are not to be skipped; names file, row and reason.
    """
    if config.on_bad_row == "stop":
        raise DataError(f"{path}, row {row}: {reason}; fix the row or pass --data.on_bad_row skip")
    skipped[row] = reason


def warn_of_skipped(path: str, skipped: dict[int, str], num_rows: int) -> None:
    """Count the skipped rows of a file in the log, and name the first ones with their reasons."""
    if not skipped:
        return
    shown = "; ".join(f"row {row}: {skipped[row]}" for row in sorted(skipped)[:5])
    more = "; ..." if len(skipped) > 5 else ""
    logger.warning("%s: skipped %d of %d rows (%s%s)", path, len(skipped), num_rows, shown, more)
