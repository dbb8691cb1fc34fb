"""Texts to windows, bad rows named."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.config import DataConfig
from services.errors import ConfigError, DataError
from trainer.texts import check_windows_fit, load_texts
from trainer.tiny_pair import build_tokenizer


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def test_texts_end_with_the_end_token_and_are_cut_into_windows(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    a, end = ord("a"), tokenizer.eos_token_id
    path = write(tmp_path / "t.jsonl", json.dumps({"text": "aaaaa"}), "", json.dumps({"text": "aa", "more": 1}))
    assert load_texts(path, DataConfig(), tokenizer) == [[a] * 5 + [end], [a, a, end]]
    assert load_texts(path, DataConfig(max_text_tokens=4), tokenizer) == [[a] * 4, [a, end], [a, a, end]]
    # A window of one token has nothing to predict.
    assert load_texts(path, DataConfig(max_text_tokens=2), tokenizer) == [[a, a], [a, a], [a, end], [a, a]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "row 1: invalid JSON"),
        ("[1]", "row 1: expected a JSON object"),
        ('{"body": "x"}', "row 1: `text` must be non-empty text, got None"),
        ('{"text": 3}', "row 1: `text` must be non-empty text, got 3"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_bad_row_is_named(line: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason.replace("[", "\\[")):
        load_texts(write(tmp_path / "t.jsonl", line), DataConfig(), build_tokenizer())


def test_a_file_without_texts_or_none_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text of two tokens"):
        load_texts(write(tmp_path / "t.jsonl", ""), DataConfig(), build_tokenizer())
    with pytest.raises(DataError, match=r"data\.lm_path is a JSONL file"):
        load_texts(str(tmp_path / "none.jsonl"), DataConfig(), build_tokenizer())


def test_windows_longer_than_the_model_are_refused() -> None:
    model = SimpleNamespace(max_position_embeddings=3)
    check_windows_fit([[1, 2, 3], [1]], model)
    check_windows_fit([], model)
    with pytest.raises(ConfigError, match=r"4 tokens, the student takes 3; pass --data\.max_text_tokens 3"):
        check_windows_fit([[1, 2], [1, 2, 3, 4]], model)
