"""`[data]`: prompts to train on."""

from typing import Annotated, Any, Literal

from pydantic import Field

from services.config.section import Section


class DataConfig(Section):
    """Prompts to train on."""

    path: str | None = None
    """Prompts to train on: a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow), a folder of such files, a folder that
    `save_to_disk` wrote, or owner/name of a data set on the hub; required by the trainer."""
    split: str | None = None
    """Split of data.path; default: train, or the only one there is."""
    config_name: str | None = None
    """Configuration of a data set on the hub that has several (`name` of load_dataset)."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the hub."""
    more_paths: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Further sources of prompts and how often their rows are used against one of data.path, as JSON, e.g. {"maths.jsonl": 0.5}:
    every third row is from there."""
    eval_path: str | None = None
    """Held-out prompts, as data.path; no evaluation without them."""
    eval_split: str | None = None
    """Split of data.eval_path; without data.eval_path, of data.path: its rows are held out."""
    held_out: float | None = Field(None, gt=0)
    """Holds out rows of data.path for the evaluation: as many, or below 1 this part of them; chosen by the seed. Rows with the
    prompt of a held-out one are not trained on."""
    lm_path: str | None = None
    """Texts whose cross-entropy loss.alpha_lm weighs, as data.path: a text a row."""
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
    filters: dict[str, Any] = {}
    """Rows of prompts that are used, by column, as JSON: a value, a list of values, or a table of "min", "max" and "not", e.g.
    {"language": ["de", "en"], "level": {"min": 2}}. What each leaves out is counted."""
    filter_max_prompt_tokens: int | None = Field(None, ge=1)
    """Leaves out longer prompts, tokens, which are no bad rows then."""
    tokenize_at_start: int = Field(10_000, ge=0)
    """Up to so many rows of a source are tokenised before anything is trained. Of more rows the columns are checked then, and
    their tokens when their turn comes."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What a bad row of any of the files does (no prompt, invalid JSON, too long, unknown ids); skipped rows are counted and
    named."""
    shuffle: bool = True
    """Seeded new order in every epoch."""

    @property
    def has_held_out_rows(self) -> bool:
        """Whether there is something to evaluate on."""
        return (self.eval_path, self.eval_split, self.held_out) != (None, None, None)

    @property
    def continues_final_message(self) -> bool:
        """Whether the student goes on with a conversation's last message instead of opening a turn."""
        return bool(self.chat_template_kwargs.get("continue_final_message"))
