"""Dataset texts for MiniLLM's L_PT: a source to windows of token ids.

consumes   what trainer/data/sources.py opens, a row an object with `text`
produces   windows of token ids, of which every token but the first is predicted; all of them are held in memory
"""

import reprlib
from typing import Any

from transformers import PreTrainedTokenizerBase

from services.config import DataConfig
from services.errors import ConfigError, DataError
from services.models.text import TextError, check_is_text, encode_prompt
from trainer.data.prompts import stop_or_skip, warn_of_skipped
from trainer.data.sources import Source, open_table
from trainer.data.text_limits import NO_LIMITS, TextLimits, check_characters


def load_texts(
    path: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, limits: TextLimits = NO_LIMITS
) -> list[list[int]]:
    """Tokenise every text, end it with one end token, and cut it into windows of `config.max_text_tokens`.

    Args:
        limits: what the student can take.

    Raises:
        DataError: the file cannot be read, a row is bad (unless `config.on_bad_row` is "skip"), or there is no window of
            two tokens.
    """
    size = config.max_text_tokens
    windows: list[list[int]] = []
    skipped: dict[int, str] = {}
    table = open_table(Source(path, "data.lm_path"))
    for index in range(len(table)):
        try:
            ids = _encode(_text(table.read(index), config.text_column), tokenizer)
            limits.check_ids(f"`{config.text_column}`", ids, tokenizer)
        except (DataError, TextError) as error:
            file, row = table.locate(index)
            stop_or_skip(file, row if config.on_bad_row == "stop" else table.number(index), str(error), config, skipped)
            continue
        windows += [ids[i : i + size] for i in range(0, len(ids), size)]
    warn_of_skipped(path, skipped, len(table))
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise DataError(f"{path} holds no text of two tokens; a row is a JSON object with `{config.text_column}`")
    return windows


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """With one BOS in front, where the tokenizer adds one, and one end token behind, whoever wrote it."""
    ids, end = encode_prompt(tokenizer, text, special=True), tokenizer.eos_token_id
    if end is None:
        return ids
    while ids and ids[-1] == end:
        ids.pop()
    return [*ids, end]


def _text(row: dict[str, Any], column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text:
        raise DataError(f"`{column}` must be non-empty text, got {reprlib.repr(text)}")
    check_is_text(f"`{column}`", text)
    check_characters(f"`{column}`", text)
    return text


def check_windows_fit(windows: list[list[int]], model_config: Any) -> None:
    """Refuse windows that are longer than the model has positions.

    Raises:
        ConfigError: names both lengths.
    """
    longest, limit = max(map(len, windows), default=0), getattr(model_config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.lm_path has texts of {longest} tokens, the student takes {limit}; pass --data.max_text_tokens {limit}"
        )
