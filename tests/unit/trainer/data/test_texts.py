"""Texts to windows, bad rows named."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.config import DataConfig
from services.errors import ConfigError, DataError
from tests.tokenizers import FAMILIES
from trainer.data.text_limits import TextLimits
from trainer.data.texts import check_windows_fit, load_texts
from trainer.tiny.pair import build_tokenizer


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
        ('{"text": null}', "row 1: `text` must be non-empty text, got None"),
        ('{"text": "a", "text": "b"}', "row 1: invalid JSON (text is given twice"),
        ('{"text": "a", "n": NaN}', "row 1: invalid JSON (NaN is no JSON number"),
        (json.dumps({"text": "x" * 4_000_001}), "row 1: `text` has 4000001 characters, more than 4000000; cut it into"),
        ('{"text": "<|user|>"}', "row 1: `text` holds '<|user|>', token id 259, beyond the 259 rows"),
    ],
)
def test_a_bad_row_is_named_or_skipped(
    line: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, limits = write(tmp_path / "t.jsonl", line, '{"text": "ok"}'), TextLimits(vocab_size=259)
    with pytest.raises(DataError, match=f"{re.escape(reason)}.*pass --data.on_bad_row skip"):
        load_texts(path, DataConfig(), build_tokenizer(), limits)
    with caplog.at_level(logging.WARNING):
        windows = load_texts(path, DataConfig(on_bad_row="skip"), build_tokenizer(), limits)
    assert windows == [[*b"ok", build_tokenizer().eos_token_id]]
    assert "skipped 1 of 2 rows (" in caplog.text and reason in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("written", ["", "{bos}", "{eos}", "{bos} and {eos}"])
def test_a_text_has_one_bos_and_one_end_whoever_writes_them(family: str, written: str, tmp_path: Path) -> None:
    tokenizer = FAMILIES[family]()
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    text = (bos if "{bos}" in written and bos else "") + "the fox" + (eos if "{eos}" in written and eos else "")
    (ids,) = load_texts(write(tmp_path / "t.jsonl", json.dumps({"text": text})), DataConfig(), tokenizer)
    opening = [i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id) if i is not None][:1]
    has_opening = tokenizer("a")["input_ids"][:1] == opening or (bos is not None and text.startswith(bos))
    front = opening if has_opening else []
    marks = [i for i in ids if i in tokenizer.all_special_ids]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    assert marks == [*front, *end] and ids[: len(front)] == front and ids[len(ids) - len(end) :] == end


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
