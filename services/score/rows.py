"""Rows of a JSONL file to score, as the teacher API takes them.

    consumes   lines: {"prompt", "completion"}, texts or lists of messages; {"messages"}; {"token_ids", "prompt_length"};
               "tools" beside messages. null is "absent"; other columns are ignored
    produces   shards: a fixed number of lines each, bad ones apart with their reasons

Read as a stream: one shard is in memory at a time.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from services.errors import DataError, describe_validation_error
from services.strict_json import parse_object, without_bom
from services.wire.teacher import TeacherSequence

_FORMS = {
    "token_ids": ("token_ids", "prompt_length"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
}
"""The columns of each form, by the one that no other form has."""

_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """What a file to score is recognised by."""

    name: str
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> tuple["InputFile", int]:
        """The file and its number of lines.

        Raises:
            DataError: it cannot be read, or is empty.
        """
        digest, num_bytes, num_lines, last = hashlib.sha256(), 0, 0, b"\n"
        try:
            with path.open("rb") as file:
                while block := file.read(_HASHED_AT_ONCE):
                    digest.update(block)
                    num_bytes += len(block)
                    num_lines += block.count(b"\n")
                    last = block[-1:]
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; --input is a JSONL file in UTF-8") from error
        if num_bytes == 0:
            raise DataError(f"{path} is empty; --input is a JSONL file with one row to score a line")
        return cls(path.name, num_bytes, digest.hexdigest()), num_lines + (last != b"\n")


@dataclass
class ShardRows:
    """The lines of one shard; `rows` and `sequences` belong together, one entry a line that can be scored."""

    index: int
    first_row: int
    """1-based line of the file."""
    num_lines: int = 0
    rows: list[int] = field(default_factory=list)
    sequences: list[dict[str, Any]] = field(default_factory=list)
    bad_rows: dict[int, str] = field(default_factory=dict)
    """Reasons by line."""


def read_shards_of_rows(path: Path, shard_rows: int, skip: frozenset[int]) -> Iterator[ShardRows]:
    """The shards of a file but those of `skip`, whose lines are only counted; blank lines count and are no rows.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for index in itertools.count():
                shard = ShardRows(index, first_row=index * shard_rows + 1)
                for row, line in enumerate(itertools.islice(file, shard_rows), start=shard.first_row):
                    shard.num_lines += 1
                    line = without_bom(line) if row == 1 else line
                    if index not in skip and line.strip():
                        _add(shard, row, line)
                if shard.num_lines == 0:
                    return
                if index not in skip:
                    yield shard
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; --input is a JSONL file in UTF-8") from error


def _add(shard: ShardRows, row: int, line: bytes) -> None:
    try:
        sequence = parse_row(line)
    except DataError as error:
        shard.bad_rows[row] = str(error)
    else:
        shard.rows.append(row)
        shard.sequences.append(sequence)


def parse_row(line: bytes) -> dict[str, Any]:
    """The sequence of one line, in the API's words.

    Raises:
        DataError: it is no JSON object, or has none or several of the forms of a sequence.
    """
    content = parse_object(line)
    sequence = _sequence({name: value for name, value in content.items() if value is not None})
    try:
        TeacherSequence.model_validate(sequence)
    except ValidationError as error:
        name, reason = describe_validation_error(error)[0]
        raise DataError(f"`{name}`: {reason}") from error
    try:
        json.dumps(sequence, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError("it holds half a surrogate pair, which is no text") from error
    return sequence


def _sequence(content: dict[str, Any]) -> dict[str, Any]:
    """The columns of the one form that a row without its nulls has."""
    forms = [columns for own, columns in _FORMS.items() if own in content]
    if len(forms) != 1:
        wanted = "`prompt` and `completion`, `messages`, or `token_ids` and `prompt_length`"
        raise DataError(f"expected either {wanted}, found {sorted(content)}")
    (columns,) = forms
    missing = [name for name in columns if name not in content]
    if missing:
        raise DataError(f"`{missing[0]}` is missing")
    sequence = {name: content[name] for name in columns}
    if "completion" in sequence and any(isinstance(text, list) for text in sequence.values()):
        sequence = {"messages": _as_messages(**sequence)}
    if "messages" in sequence and "tools" in content:
        sequence["tools"] = content["tools"]
    return sequence


def _as_messages(prompt: Any, completion: Any) -> list[Any]:
    """A prompt and a completion of which at least one is a list of messages, as one conversation.

    Raises:
        DataError: the completion is more than one turn of the assistant's, of which the API scores the last one alone.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise DataError("`prompt` and `completion` must be texts or lists of messages")
    if len(completion) != 1:
        raise DataError(
            f"`completion` has {len(completion)} messages, but one is scored; put those before it into `prompt`"
        )
    return [*prompt, *completion]
