"""Dataset rows to token ids, and the order in which they are used.

    consumes   a JSONL file, a row an object with `prompt` (text, or a list of messages) or `messages` (chat), maybe `tools`
               beside messages, an `answer`, and the name of its teacher; null is "absent"
    produces   Prompt objects; extra columns ride along

All rows are read and tokenised at start, so that a bad row is reported before anything is trained.
Left out: streaming of files that do not fit in memory.
"""

import logging
import reprlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from services.config import DataConfig
from services.errors import DataError, describe_validation_error
from services.models.text import TextError, check_is_text, encode_completion, encode_prompt, render_messages
from services.strict_json import JsonError, parse_json
from services.wire.conversation import ChatMessage, Conversation
from trainer.data.text_limits import NO_LIMITS, TextLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    row: int  # 1-based line in the file
    token_ids: list[int]
    text: str
    answer: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None  # its name in teacher_client.named; None: the teacher of rows that name none
    answer_token_ids: list[int] = field(default_factory=list)
    """Of the stripped answer behind the prompt, without an end."""
    messages: list[dict[str, Any]] | None = None
    """The conversation that `text` renders, for reward functions; None where the row holds a text."""


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

        def reason(prompt: Prompt) -> str | None:
            length = len(prompt.token_ids)
            return (
                f"the prompt has {length} tokens, more than the {limit} that leave room to answer"
                if length > limit
                else None
            )

        return self.without(reason).used()

    def without(self, reason: Callable[[Prompt], str | None]) -> "PromptRows":
        """The rows for which there is no reason to leave them out.

        Raises:
            DataError: there is one, unless `config.on_bad_row` is "skip".
        """
        prompts, skipped = [], dict(self.skipped)
        for prompt in self.prompts:
            if (why := reason(prompt)) is None:
                prompts.append(prompt)
            else:
                stop_or_skip(self.path, prompt.row, why, self.config, skipped)
        return replace(self, prompts=prompts, skipped=skipped)

    def used(self) -> list[Prompt]:
        """The prompts; what was skipped is said.

        Raises:
            DataError: there is none.
        """
        warn_of_skipped(self.path, self.skipped, len(self.skipped) + len(self.prompts))
        if not self.prompts:
            wanted = f"`{self.config.prompt_column}` or `{self.config.messages_column}`"
            raise DataError(f"{self.path} holds no usable row; a row is a JSON object with {wanted}")
        return self.prompts


def read_prompts(
    path: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    option: str = "data.path",
    teachers: Collection[str] = (),
    limits: TextLimits = NO_LIMITS,
) -> PromptRows:
    """Read and tokenise a JSONL file, which `option` names.

    Args:
        teachers: names that `config.teacher_column` may hold; without any it is a column like others.
        limits: what the student can take.

    Raises:
        DataError: the file is missing, or (unless `config.on_bad_row` is "skip") a row is bad; the message names file,
            row and reason.
    """
    prompts: list[Prompt] = []
    skipped: dict[int, str] = {}
    for row, line in read_lines(path, option):
        try:
            prompts.append(_parse_row(row, line, config, tokenizer, teachers, limits))
        except DataError as error:
            stop_or_skip(path, row, str(error), config, skipped)
    return PromptRows(path, config, prompts, skipped)


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


def read_lines(path: str, option: str) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of the lines that are not blank; `option` names the file in errors.

    A line ends with LF or CRLF; a CR alone, which JSON takes for a space, ends none.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="\n") as file:  # with or without a BOM
            for row, line in enumerate(file, start=1):
                if line.strip():
                    yield row, line
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; {option} is a JSONL file in UTF-8") from error


def parse_object(line: str) -> dict[str, Any]:
    """One line of a JSONL file.

    Raises:
        DataError: it is no JSON object, or gives a key twice.
    """
    try:
        content = parse_json(line)
    except JsonError as error:
        raise DataError(f"invalid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"expected a JSON object, got {type(content).__name__}")
    return content


def _parse_row(
    row: int,
    line: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    teachers: Collection[str],
    limits: TextLimits,
) -> Prompt:
    content = parse_object(line)
    present = {name: value for name, value in content.items() if value is not None}
    try:
        prompt = _read_prompt(present, config, tokenizer)
        limits.at_most(config.max_prompt_tokens).check_length("the prompt", prompt.text, tokenizer)
        token_ids = encode_prompt(tokenizer, prompt.text, special=not prompt.is_chat)
        answer = _answer(present, config.answer_column)
        answer_ids = [] if answer is None else _encode_answer(answer, prompt, token_ids, tokenizer, limits)
    except TextError as error:
        raise DataError(str(error)) from error
    if not token_ids:
        raise DataError("the prompt has no tokens")
    limits.check_ids("the prompt", token_ids, tokenizer)
    limits.check_ids("the answer", answer_ids, tokenizer)
    used = {config.prompt_column, config.answer_column, config.messages_column}
    used |= {"tools"} if prompt.is_chat else set()
    teacher = None
    if teachers:
        teacher = _teacher(content, config.teacher_column, teachers)
        used.add(config.teacher_column)
    columns = {name: value for name, value in content.items() if name not in used}
    return Prompt(row, token_ids, prompt.text, answer, columns, teacher, answer_ids, prompt.messages)


def _teacher(row: dict[str, Any], column: str, known: Collection[str]) -> str | None:
    name = row.get(column)
    if name is not None and not (isinstance(name, str) and name in known):
        names = ", ".join(map(repr, known))
        raise DataError(
            f"`{column}` must be null or a name in teacher_client.named ({names}), got {type(name).__name__} {reprlib.repr(name)}"
        )
    return name


def _answer(row: dict[str, Any], column: str) -> str | None:
    answer = row.get(column)
    if answer is None:
        return None
    # A whole number has one text. True is an int to Python; 18.0 or 1e3 has another text for everyone who writes it.
    if not isinstance(answer, str | int) or isinstance(answer, bool):
        got = f"{type(answer).__name__} {reprlib.repr(answer)}"
        raise DataError(f"`{column}` must be text, got {got}; put it in quotes")
    check_is_text(f"`{column}`", str(answer))
    return str(answer)


@dataclass(frozen=True)
class _PromptText:
    text: str
    messages: list[dict[str, Any]] | None = None
    """What a chat template rendered, special tokens included."""

    @property
    def is_chat(self) -> bool:
        return self.messages is not None


def _encode_answer(
    answer: str, prompt: _PromptText, token_ids: list[int], tokenizer: PreTrainedTokenizerBase, limits: TextLimits
) -> list[int]:
    limits.check_length("the answer", answer, tokenizer)
    return encode_completion(tokenizer, prompt.text, token_ids, answer.strip(), special=not prompt.is_chat)


def _read_prompt(row: dict[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> _PromptText:
    prompt_column, messages_column = config.prompt_column, config.messages_column
    found = [column for column in (prompt_column, messages_column) if column in row]
    if not found:
        raise DataError(f"neither `{prompt_column}` nor `{messages_column}` in the row (found: {sorted(row)})")
    if len(found) > 1:
        raise DataError(f"both `{prompt_column}` and `{messages_column}` in the row; leave one out or make it null")
    (column,) = found
    value = row[column]
    if column == messages_column or isinstance(value, list):
        return _render(column, value, row.get("tools"), config, tokenizer)
    if not isinstance(value, str) or not value:
        raise DataError(f"`{column}` must be non-empty text or a list of messages, got {reprlib.repr(value)}")
    check_is_text(f"`{column}`", value)
    return _PromptText(value)


def _render(
    column: str, messages: Any, tools: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> _PromptText:
    """What the chat template makes of the `messages` in `column` and of `tools`."""
    try:
        conversation = Conversation.model_validate({"messages": messages, "tools": tools})
    except ValidationError as error:
        name, reason = describe_validation_error(error)[0]
        raise DataError(f"`{name.replace('messages', column, 1)}`: {reason}") from error
    if tokenizer.chat_template is None:
        raise DataError(f"`{column}` needs a chat template, which this tokenizer does not have")
    asked = _without_last_turn(column, conversation.messages, config)
    options: dict[str, Any] = {
        "add_generation_prompt": not config.continues_final_message,
        **config.chat_template_kwargs,
    }
    if conversation.tools is not None:
        options["tools"] = conversation.tools
    rendered = [message.for_template() for message in asked]
    text = render_messages(f"`{column}`", rendered, tokenizer, **options)
    check_is_text(f"`{column}`", text)
    return _PromptText(text, rendered)


def _without_last_turn(column: str, messages: list[ChatMessage], config: DataConfig) -> list[ChatMessage]:
    """The conversation up to where the student takes over."""
    asked = list(messages)
    while asked and asked[-1].role == "assistant" and not config.continues_final_message:
        asked.pop()
    if len(asked) < len(messages) and config.last_assistant_turn == "refuse":
        raise DataError(
            f"`{column}` ends with the assistant, whose turn is the student's to write; leave that message out or pass "
            "--data.last_assistant_turn drop"
        )
    if not asked:
        raise DataError(f"`{column}` holds messages of the assistant alone; put a question in front of them")
    return asked
