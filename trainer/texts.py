"""Dataset texts for MiniLLM's L_PT: a JSONL file to windows of token ids.

consumes   a JSONL file, a row an object with `text`
produces   windows of token ids, of which every token but the first is predicted
"""

from transformers import PreTrainedTokenizerBase

from services.config import DataConfig
from services.errors import DataError
from trainer.prompts import check_is_text, parse_object, read_lines


def load_texts(path: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[list[int]]:
    """Tokenise every text, end it with the end token, and cut it into windows.

    Args:
        max_tokens: of a window; `config.max_text_tokens` lowers it further.

    Raises:
        DataError: the file cannot be read, a row has no text, or there is no window of two tokens.
    """
    size = min(max_tokens, config.max_text_tokens)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    windows: list[list[int]] = []
    for row, line in read_lines(path, "data.lm_path"):
        try:
            ids = [*tokenizer(_text(line, config.text_column))["input_ids"], *end]
        except DataError as error:
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
    check_is_text(column, text)
    return text
