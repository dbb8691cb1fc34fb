"""One row to a Prompt.

    check     what its columns tell: form, types, teacher, characters; takes microseconds
    encode    the chat template and the tokenizer as well; takes hundreds of them

A row is an object with `prompt` (text, or a list of messages) or `messages` (chat), maybe `tools` beside messages, an `answer`,
and the name of its teacher; null is "absent". These are TRL's prompt-only and prompt-completion forms, standard and
conversational; a `completion` is a column like any other, and so are `chosen` and `rejected` beside a prompt.
"""

import hashlib
import json
import reprlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from services.config import DataConfig
from services.errors import DataError, describe_validation_error
from services.models.text import TextError, check_is_text, encode_completion, encode_prompt, render_messages
from services.strict_json import JsonError, parse_json
from services.wire.conversation import ChatMessage, Conversation
from trainer.data.text_limits import NO_LIMITS, TextLimits


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
class CheckedRow:
    """What the columns of a row tell.

    Attributes:
        question: what the student is asked: a text, or a conversation for the chat template.
        columns: those that nothing here uses.
    """

    question: "str | _Chat"
    answer: str | None
    teacher: str | None
    columns: dict[str, Any]

    def names(self, config: DataConfig) -> set[str]:
        """Of all columns but the question's, as reward functions are given them."""
        given = {config.answer_column: self.answer, config.teacher_column: self.teacher}
        return {*self.columns, *(name for name, value in given.items() if value is not None)}

    def key(self) -> int:
        """Of the question, 64 bits with a sign: equal for equal questions."""
        asked = self.question if isinstance(self.question, str) else self.question.spelled()
        return int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=8).digest(), signed=True)


@dataclass(frozen=True)
class _Chat:
    column: str
    messages: list[ChatMessage]
    """Up to where the student takes over."""
    tools: list[dict[str, Any]] | None

    def rendered(self) -> list[dict[str, Any]]:
        """The messages as the template takes them."""
        return [message.for_template() for message in self.messages]

    def spelled(self) -> str:
        return json.dumps([self.rendered(), self.tools], default=str)


@dataclass(frozen=True)
class RowReader:
    """How the rows of a source are read.

    Attributes:
        teachers: names that `config.teacher_column` may hold; without any it is a column like others.
        limits: what the student can take.
    """

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    teachers: Collection[str] = ()
    limits: TextLimits = NO_LIMITS

    def check(self, content: dict[str, Any]) -> CheckedRow:
        """What the columns of a row tell.

        Raises:
            DataError: the reason why it cannot be used.
        """
        config = self.config
        present = {name: value for name, value in content.items() if value is not None}
        try:
            column = self._question_column(present)
            question = self._question(column, present)
            if isinstance(question, str):
                self._check_prompt_length(question)
            answer = _answer(present, config.answer_column)
            if answer is not None:
                self.limits.check_length("the answer", answer, self.tokenizer)
        except TextError as error:
            raise DataError(str(error)) from error
        used = {config.prompt_column, config.answer_column, config.messages_column}
        used |= set() if isinstance(question, str) else {"tools"}
        teacher = None
        if self.teachers:
            teacher = _teacher(content, config.teacher_column, self.teachers)
            used.add(config.teacher_column)
        columns = {name: value for name, value in content.items() if name not in used}
        return CheckedRow(question, answer, teacher, columns)

    def encode(self, row: int, content: dict[str, Any]) -> Prompt:
        """A row as token ids; `row` is its 1-based number.

        Raises:
            DataError: the reason why it cannot be used.
        """
        checked, tokenizer, limits = self.check(content), self.tokenizer, self.limits
        chat = None if isinstance(checked.question, str) else checked.question
        is_chat = chat is not None
        try:
            text = self._render(checked.question) if not isinstance(checked.question, str) else checked.question
            self._check_prompt_length(text)
            token_ids = encode_prompt(tokenizer, text, special=not is_chat)
            answer_ids: list[int] = []
            if checked.answer is not None:
                answer_ids = encode_completion(tokenizer, text, token_ids, checked.answer.strip(), special=not is_chat)
        except TextError as error:
            raise DataError(str(error)) from error
        if not token_ids:
            raise DataError("the prompt has no tokens")
        limits.check_ids("the prompt", token_ids, tokenizer)
        limits.check_ids("the answer", answer_ids, tokenizer)
        messages = None if chat is None else chat.rendered()
        return Prompt(row, token_ids, text, checked.answer, checked.columns, checked.teacher, answer_ids, messages)

    def _check_prompt_length(self, text: str) -> None:
        self.limits.at_most(self.config.max_prompt_tokens).check_length("the prompt", text, self.tokenizer)

    def _question_column(self, row: dict[str, Any]) -> str:
        prompt_column, messages_column = self.config.prompt_column, self.config.messages_column
        found = [column for column in (prompt_column, messages_column) if column in row]
        if not found:
            raise DataError(
                f"neither `{prompt_column}` nor `{messages_column}` in the row (found: {sorted(row)}){_other_form(row)}"
            )
        if len(found) > 1:
            raise DataError(f"both `{prompt_column}` and `{messages_column}` in the row; leave one out or make it null")
        return found[0]

    def _question(self, column: str, row: dict[str, Any]) -> str | _Chat:
        value = row[column]
        if column == self.config.messages_column or isinstance(value, list):
            return self._chat(column, value, row.get("tools"))
        if not isinstance(value, str) or not value:
            raise DataError(f"`{column}` must be non-empty text or a list of messages, got {reprlib.repr(value)}")
        check_is_text(f"`{column}`", value)
        return value

    def _chat(self, column: str, messages: Any, tools: Any) -> _Chat:
        try:
            conversation = Conversation.model_validate({"messages": _parsed_list(messages), "tools": tools})
        except ValidationError as error:
            name, reason = describe_validation_error(error)[0]
            raise DataError(f"`{name.replace('messages', column, 1)}`: {reason}") from error
        if self.tokenizer.chat_template is None:
            raise DataError(f"`{column}` needs a chat template, which this tokenizer does not have")
        return _Chat(column, self._without_last_turn(column, conversation.messages), conversation.tools)

    def _render(self, chat: _Chat) -> str:
        """What the chat template makes of a conversation."""
        options: dict[str, Any] = {
            "add_generation_prompt": not self.config.continues_final_message,
            **self.config.chat_template_kwargs,
        }
        if chat.tools is not None:
            options["tools"] = chat.tools
        text = render_messages(f"`{chat.column}`", chat.rendered(), self.tokenizer, **options)
        check_is_text(f"`{chat.column}`", text)
        return text

    def _without_last_turn(self, column: str, messages: list[ChatMessage]) -> list[ChatMessage]:
        """The conversation up to where the student takes over."""
        asked, config = list(messages), self.config
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


def _other_form(row: dict[str, Any]) -> str:
    """What to do with rows of another of TRL's forms, for the end of a message."""
    if "chosen" in row and "rejected" in row:
        return (
            ": these are preferences without a prompt of their own; split what both begin with into a column `prompt` "
            "(trl.extract_prompt does), the student writes the completions itself"
        )
    if isinstance(row.get("text"), str):
        return ": `text` is for language modeling, which data.lm_path takes; if it is a prompt, pass --data.prompt_column text"
    return ""


def _parsed_list(messages: Any) -> Any:
    """A list as JSON text is that list: a cell of a CSV file can hold no other."""
    if not isinstance(messages, str) or not messages.lstrip().startswith("["):
        return messages
    try:
        return parse_json(messages)
    except JsonError as error:
        raise DataError(f"invalid JSON in a conversation ({error})") from error


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
    if (
        isinstance(answer, list)
        and len(answer) == 1
        and isinstance(answer[0], dict)
        and answer[0].get("role") == "assistant"
    ):
        answer = answer[0].get("content")  # a conversational `completion`
    # A whole number has one text. True is an int to Python; 18.0 or 1e3 has another text for everyone who writes it.
    if not isinstance(answer, str | int) or isinstance(answer, bool):
        got = f"{type(answer).__name__} {reprlib.repr(answer)}"
        raise DataError(f"`{column}` must be text, got {got}; put it in quotes")
    check_is_text(f"`{column}`", str(answer))
    return str(answer)
