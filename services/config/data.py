"""`[data]`: prompts to train on."""

from typing import Any, Literal

from pydantic import Field

from services.config.section import Section


class DataConfig(Section):
    """Prompts to train on."""

    path: str | None = None
    """JSONL file with one prompt a row; required by the trainer."""
    eval_path: str | None = None
    """JSONL file of held-out prompts; no evaluation without it."""
    lm_path: str | None = None
    """JSONL file of texts whose cross-entropy loss.alpha_lm weighs."""
    text_column: str = "text"
    """Column of data.lm_path that holds the text."""
    max_text_tokens: int = Field(512, ge=2)
    """Longer texts of data.lm_path are cut into windows of this many tokens."""
    prompt_column: str = "prompt"
    """Column that holds a text prompt, or a list of messages."""
    messages_column: str = "messages"
    """Column that holds a conversation, rendered by the tokenizer's chat template with the row's `tools`; a row has this or
    a prompt."""
    last_assistant_turn: Literal["refuse", "drop"] = "refuse"
    """What is done with messages of the assistant at the end of a conversation, where the student is to answer."""
    answer_column: str = "answer"
    """Column that holds the reference answer, where there is one; used by the evaluation alone."""
    teacher_column: str = "teacher"
    """Column that names the row's teacher in teacher_client.named; absent or null: that of teacher_client.urls. Without
    teacher_client.named it is a column like any other."""
    chat_template_kwargs: dict[str, Any] = {}
    """Keyword arguments of the chat template, as JSON, e.g. {"enable_thinking": false}."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt, tokens; default: what leaves room for max_new_tokens in max_model_len."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What a bad row of any of the files does (no prompt, invalid JSON, too long, unknown ids); skipped rows are counted and
    named."""
    shuffle: bool = True
    """Seeded new order in every epoch."""

    @property
    def continues_final_message(self) -> bool:
        """Whether the student goes on with a conversation's last message instead of opening a turn."""
        return bool(self.chat_template_kwargs.get("continue_final_message"))
