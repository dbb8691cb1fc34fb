"""Dataset texts for MiniLLM's L_PT: a JSONL file to windows of token ids.

consumes   a JSONL file, a row an object with `text`
produces   windows of token ids, of which every token but the first is predicted
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from services.config import DataConfig
from services.errors import ConfigError, DataError
from services.text import TextError, check_is_text
from trainer.prompts import parse_object, read_lines


def load_texts(path: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenise every text, end it with the end token, and cut it into windows of `config.max_text_tokens`.

    Raises:
        DataError: the file cannot be read, a row has no text, or there is no window of two tokens.
    """
    size = config.max_text_tokens
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    windows: list[list[int]] = []
    for row, line in read_lines(path, "data.lm_path"):
        try:
            ids = [*tokenizer(_text(line, config.text_column))["input_ids"], *end]
        except (DataError, TextError) as error:
            raise DataError(f"{path}, row {row}: {error}; fix the row") from error
        windows += [ids[i : i + size] for i in range(0, len(ids), size)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise DataError(f"{path} holds no text of two tokens; a row is a JSON object with `{config.text_column}`")
    return windows


def _text(line: str, column: str) -> str:
    text = parse_object(line).get(column)
    if not isinstance(text, str) or not text:
        raise DataError(f"`{column}` must be non-empty text, got {text!r}")
    check_is_text(f"`{column}`", text)
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
