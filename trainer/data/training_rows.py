"""What a run trains on: one source, or several mixed by weight; and what is held out of them for the evaluation."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from services.config import DataConfig
from services.errors import ConfigError, DataError
from trainer.data.checked_rows import CheckedRows
from trainer.data.fingerprints import A_STREAM, fingerprint_of_prompts
from trainer.data.prompts import (
    Prompt,
    PromptRows,
    StreamedPrompts,
    check_source,
    encode_rows,
    first_prompts,
    read_prompts,
    source_of,
)
from trainer.data.rows import RowReader
from trainer.data.sources import Source
from trainer.data.stream import IteratedStream, MixedStream, RowStream
from trainer.data.text_limits import NO_LIMITS, TextLimits


@dataclass(frozen=True)
class TrainingPrompts:
    """Prompts of every source, of the length that the servers take.

    Attributes:
        weights: how often the rows of each source are used, against each other.
        names: of the sources, for messages.
        is_stream: the first source is the beginning of a stream: its rows have their own order, and a longer run has more.
    """

    parts: list[Sequence[Prompt | None] | StreamedPrompts]
    weights: list[float]
    names: list[str]
    is_stream: bool = False

    def fingerprints(self) -> list[list[str]]:
        """Of each source its name and which rows it has, see trainer/data/fingerprints.py."""
        return [
            [name, A_STREAM if self._is_stream(index) else fingerprint_of_prompts(part)]
            for index, (name, part) in enumerate(zip(self.names, self.parts, strict=True))
        ]

    def _is_stream(self, index: int) -> bool:
        return self.is_stream and index == 0

    def __len__(self) -> int:
        """Rows of an epoch: those of all sources, once.

        Raises:
            ConfigError: a source is an IterableDataset.
        """
        if any(isinstance(part, StreamedPrompts) for part in self.parts):
            raise ConfigError(
                "pipeline.epochs needs the number of rows, which an IterableDataset does not tell; give pipeline.steps"
            )
        return sum(len(part) for part in self.parts if not isinstance(part, StreamedPrompts))

    def first(self, count: int) -> list[Prompt]:
        """The first prompts of the first source."""
        return first_prompts(self.parts[0], count)

    def stream(self, *, seed: int, shuffle: bool) -> RowStream[Prompt]:
        """The prompts in the order of the run; an IterableDataset has its own."""
        streams: list[RowStream[Prompt]] = [
            IteratedStream(part.from_position)
            if isinstance(part, StreamedPrompts)
            else RowStream(part, seed=seed, shuffle=shuffle and not self._is_stream(index))
            for index, part in enumerate(self.parts)
        ]
        return streams[0] if len(streams) == 1 else MixedStream(streams, self.weights)


@dataclass(frozen=True)
class TrainingRows:
    """The rows of every source, before it is known how long a prompt may be."""

    parts: list[PromptRows]
    weights: list[float]

    @property
    def teachers(self) -> set[str | None]:
        """What rows call their teachers; None is in it if one names none."""
        return {name for part in self.parts for name in part.teachers}

    @property
    def columns(self) -> set[str] | None:
        """Names of all columns besides the question's; None where they are not known of a source."""
        found: set[str] = set()
        for part in self.parts:
            if part.columns is None:
                return None
            found |= part.columns
        return found

    def fitting(self, max_prompt_tokens: int, *, is_stream: bool = False) -> TrainingPrompts:
        """As PromptRows.fitting, of every source.

        Args:
            is_stream: as of TrainingPrompts.
        """
        fitting = [part.fitting(max_prompt_tokens) for part in self.parts]
        return TrainingPrompts(fitting, self.weights, [part.path for part in self.parts], is_stream)


def read_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    teachers: Collection[str] = (),
    limits: TextLimits = NO_LIMITS,
    train_dataset: Dataset | IterableDataset | None = None,
    eval_dataset: Dataset | None = None,
) -> tuple[TrainingRows, PromptRows | None]:
    """(rows to train on, rows held out) of all sources that `config` names.

    Args:
        seed: chooses what data.held_out holds out.
        train_dataset: instead of data.path.
        eval_dataset: instead of data.eval_path.

    Raises:
        DataError: a source cannot be read, or a row is bad.
    """
    reader = RowReader(config, tokenizer, teachers, limits)
    if isinstance(train_dataset, IterableDataset) and config.held_out is not None:
        raise DataError("data.held_out takes rows of a source that has a number of rows; an IterableDataset has none")
    main = source_of(config.path or "", config, "data.path")
    more = [Source(path, "data.more_paths") for path in config.more_paths]
    weights = [1.0, *config.more_paths.values()]
    if isinstance(train_dataset, IterableDataset):
        streamed = read_prompts(train_dataset, config, tokenizer, "train_dataset", teachers, limits)
        others = [encode_rows(check_source(source, reader, source.option), reader) for source in more]
        return TrainingRows([streamed, *others], weights), _read_held_out(config, reader, eval_dataset)
    first = (
        check_source(main, reader, main.option)
        if train_dataset is None
        else check_source(train_dataset, reader, "train_dataset")
    )
    parts = [first, *(check_source(source, reader, source.option) for source in more)]
    if config.held_out is None or eval_dataset is not None:
        held_out = _read_held_out(config, reader, eval_dataset)
    else:
        parts, kept = _hold_out(parts, config.held_out, seed)
        held_out = encode_rows(kept, reader)
    return TrainingRows([encode_rows(part, reader) for part in parts], weights), held_out


def _hold_out(parts: list[CheckedRows], share: float, seed: int) -> tuple[list[CheckedRows], CheckedRows]:
    """Rows of the first source, whose questions no source keeps."""
    first, held_out = parts[0].holding_out(share, seed)
    return [first, *(part.without_keys(held_out.keys) for part in parts[1:])], held_out


def _read_held_out(config: DataConfig, reader: RowReader, eval_dataset: Dataset | None) -> PromptRows | None:
    if eval_dataset is not None:
        return encode_rows(check_source(eval_dataset, reader, "eval_dataset"), reader)
    if config.eval_path is None and config.eval_split is None:
        return None
    source = source_of(config.eval_path or config.path or "", config, "data.eval_path")
    if config.eval_path is None:
        source = replace(source, option="data.path")
    return encode_rows(check_source(source, reader, source.option), reader)
