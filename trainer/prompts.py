"""Dataset rows to token ids, and the order in which they are used.

    consumes   a JSONL file, a row an object with `prompt` (text) or `messages` (chat)
    produces   Prompt objects; extra columns ride along

All rows are read and tokenised at start, so that a bad row is reported before anything is trained.
Left out: streaming of files that do not fit in memory.
"""

import json
import logging
import math
import random
import reprlib
from collections.abc import Iterator
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


def load_prompts(
    path: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> list[Prompt]:
    """Read and tokenise a JSONL file.

    Args:
        max_prompt_tokens: longer prompts are bad rows; `config.max_prompt_tokens` lowers it further.

    Raises:
        DataError: the file is missing, holds no usable row, or (unless `config.on_bad_row` is "skip") a row
            is bad; the message names file, row and reason.
    """
    limit = min(max_prompt_tokens, config.max_prompt_tokens or max_prompt_tokens)
    prompts, skipped = [], []
    for row, line in _lines(path):
        try:
            prompts.append(_parse_row(row, line, config, tokenizer, limit))
        except DataError as error:
            if config.on_bad_row == "stop":
                raise DataError(f"{path}, row {row}: {error}; fix the row or pass --data.on_bad_row skip") from error
            skipped.append(f"row {row}: {error}")
    if skipped:
        shown = "; ".join(skipped[:5]) + ("; ..." if len(skipped) > 5 else "")
        logger.warning("%s: skipped %d of %d rows (%s)", path, len(skipped), len(skipped) + len(prompts), shown)
    if not prompts:
        raise DataError(
            f"{path} holds no usable row; a row is a JSON object with `{config.prompt_column}` or `messages`"
        )
    return prompts


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        with Path(path).open(encoding="utf-8") as file:
            for row, line in enumerate(file, start=1):
                if line.strip():
                    yield row, line
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; data.path is a JSONL file in UTF-8") from error


def _parse_row(
    row: int, line: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> Prompt:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:  # too many digits or brackets are no JSONDecodeError
        raise DataError(f"invalid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"expected a JSON object, got {type(content).__name__}")
    try:
        text, token_ids = _tokenize(content, config, tokenizer)
        answer = _answer(content, config.answer_column)
    except TextError as error:
        raise DataError(str(error)) from error
    if not token_ids:
        raise DataError("the prompt has no tokens")
    if len(token_ids) > max_prompt_tokens:
        raise DataError(
            f"the prompt has {len(token_ids)} tokens, more than the {max_prompt_tokens} that leave room to answer"
        )
    used = {config.prompt_column, config.answer_column, "messages"}
    columns = {name: value for name, value in content.items() if name not in used}
    return Prompt(row, token_ids, text, answer, columns)


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


class PromptStream:
    """Prompts in a seeded new order every epoch; the next position is all its state."""

    def __init__(self, prompts: list[Prompt], *, seed: int, shuffle: bool) -> None:
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self.position = 0

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; a batch may span two epochs."""
        batch: list[Prompt] = []
        while len(batch) < count:
            epoch, offset = divmod(self.position, len(self._prompts))
            order = self._order(epoch)
            batch.append(self._prompts[order[offset]])
            self.position += 1
        return batch

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_cached_epoch", None) != epoch:
            self._cached_epoch = epoch
            self._cached_order = list(range(len(self._prompts)))
            if self._shuffle:
                random.Random(f"{self._seed}-{epoch}").shuffle(self._cached_order)
        return self._cached_order
