"""Dataset rows to token ids, and the order in which they are used.

    consumes   a JSONL file, a row an object with `prompt` (text) or `messages` (chat), and maybe the name of its teacher
    produces   Prompt objects; extra columns ride along

All rows are read and tokenised at start, so that a bad row is reported before anything is trained.
Left out: streaming of files that do not fit in memory.
"""

import json
import logging
import math
import reprlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from services.config import DataConfig
from services.errors import DataError
from services.text import TextError, check_is_text, render_messages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    row: int  # 1-based line in the file
    token_ids: list[int]
    text: str
    answer: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None  # its name in teacher.named; None: the teacher of rows that name none


@dataclass(frozen=True)
class PromptRows:
    """The rows of a file, read and tokenised, before it is known how long a prompt may be."""

    path: str
    config: DataConfig
    prompts: list[Prompt]
    skipped: dict[int, str]
    """Reasons by row."""

    def fitting(self, max_prompt_tokens: int) -> list[Prompt]:
        """The prompts of at most that many tokens; `config.max_prompt_tokens` lowers it further.

        Raises:
            DataError: a prompt is longer (unless `config.on_bad_row` is "skip"), or none is left.
        """
        limit = min(max_prompt_tokens, self.config.max_prompt_tokens or max_prompt_tokens)
        prompts, skipped = [], dict(self.skipped)
        for prompt in self.prompts:
            if len(prompt.token_ids) <= limit:
                prompts.append(prompt)
                continue
            reason = f"the prompt has {len(prompt.token_ids)} tokens, more than the {limit} that leave room to answer"
            _stop_or_skip(self.path, prompt.row, reason, self.config, skipped)
        if skipped:
            shown = "; ".join(f"row {row}: {skipped[row]}" for row in sorted(skipped)[:5])
            more = "; ..." if len(skipped) > 5 else ""
            total = len(skipped) + len(prompts)
            logger.warning("%s: skipped %d of %d rows (%s%s)", self.path, len(skipped), total, shown, more)
        if not prompts:
            raise DataError(
                f"{self.path} holds no usable row; a row is a JSON object with `{self.config.prompt_column}` or `messages`"
            )
        return prompts


def read_prompts(
    path: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    option: str = "data.path",
    teachers: Collection[str] = (),
) -> PromptRows:
    """Read and tokenise a JSONL file, which `option` names.

    Args:
        teachers: names that `config.teacher_column` may hold; without any it is a column like others.

    Raises:
        DataError: the file is missing, or (unless `config.on_bad_row` is "skip") a row is bad; the message names file,
            row and reason.
    """
    prompts: list[Prompt] = []
    skipped: dict[int, str] = {}
    for row, line in read_lines(path, option):
        try:
            prompts.append(_parse_row(row, line, config, tokenizer, teachers))
        except DataError as error:
            _stop_or_skip(path, row, str(error), config, skipped)
    return PromptRows(path, config, prompts, skipped)


def _stop_or_skip(path: str, row: int, reason: str, config: DataConfig, skipped: dict[int, str]) -> None:
    if config.on_bad_row == "stop":
        raise DataError(f"{path}, row {row}: {reason}; fix the row or pass --data.on_bad_row skip")
    skipped[row] = reason


def read_lines(path: str, option: str) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of the lines that are not blank; `option` names the file in errors.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            for row, line in enumerate(file, start=1):
                if line.strip():
                    yield row, line
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; {option} is a JSONL file in UTF-8") from error


def parse_object(line: str) -> dict[str, Any]:
    """One line of a JSONL file.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:  # too many digits or brackets are no JSONDecodeError
        raise DataError(f"invalid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"expected a JSON object, got {type(content).__name__}")
    return content


def _parse_row(
    row: int, line: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, teachers: Collection[str]
) -> Prompt:
    content = parse_object(line)
    try:
        text, token_ids = _tokenize(content, config, tokenizer)
        answer = _answer(content, config.answer_column)
    except TextError as error:
        raise DataError(str(error)) from error
    if not token_ids:
        raise DataError("the prompt has no tokens")
    used = {config.prompt_column, config.answer_column, "messages"}
    teacher = None
    if teachers:
        teacher = _teacher(content, config.teacher_column, teachers)
        used.add(config.teacher_column)
    columns = {name: value for name, value in content.items() if name not in used}
    return Prompt(row, token_ids, text, answer, columns, teacher)


def _teacher(row: dict[str, Any], column: str, known: Collection[str]) -> str | None:
    name = row.get(column)
    if name is not None and not (isinstance(name, str) and name in known):
        names = ", ".join(map(repr, known))
        raise DataError(
            f"`{column}` must be null or a name in teacher.named ({names}), got {type(name).__name__} {reprlib.repr(name)}"
        )
    return name


def _answer(row: dict[str, Any], column: str) -> str | None:
    answer = row.get(column)
    if answer is None:
        return None
    # True is an int to Python, and what NaN or 1e999 reads as has a text that nobody wrote.
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool) and abs(answer) < math.inf
    if not isinstance(answer, str) and not is_number:
        got = f"{type(answer).__name__} {reprlib.repr(answer)}"
        raise DataError(f"`{column}` must be text, got {got}; put it in quotes")
    check_is_text(f"`{column}`", str(answer))
    return str(answer)


def _tokenize(row: dict[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    if config.prompt_column in row:
        prompt = row[config.prompt_column]
        if not isinstance(prompt, str) or not prompt:
            raise DataError(f"`{config.prompt_column}` must be non-empty text, got {prompt!r}")
        check_is_text(f"`{config.prompt_column}`", prompt)
        return prompt, tokenizer(prompt)["input_ids"]
    if "messages" not in row:
        raise DataError(f"neither `{config.prompt_column}` nor `messages` in the row (found: {sorted(row)})")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
        raise DataError('`messages` must be a non-empty list of {"role": text, "content": text}')
    if tokenizer.chat_template is None:
        raise DataError("`messages` needs a chat template, which this tokenizer does not have")
    template_kwargs = {"add_generation_prompt": True, **config.chat_template_kwargs}
    text = render_messages("`messages`", messages, tokenizer, **template_kwargs)
    check_is_text("`messages`", text)
    # The template writes its own special tokens.
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
