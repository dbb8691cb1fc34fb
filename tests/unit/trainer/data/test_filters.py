"""Which rows a filter lets pass."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from services.config import DataConfig
from services.errors import DataError
from trainer.data.filters import failed_filter
from trainer.data.prompts import read_prompts
from trainer.tiny.pair import build_tokenizer

TOKENIZER = build_tokenizer()


@pytest.mark.parametrize(
    ("condition", "passing", "failing"),
    [
        (3, [3, "3", 3.0], [2, "03x", None, True, [3]]),
        ("3", ["3"], [3, "03", None]),
        (1, [1, "1"], [True, "true"]),
        (True, [True, "true", "True"], [1, False, None, "1"]),
        (None, [None], [0, "", False]),
        ("de", ["de"], ["DE", None, ["de"]]),
        (["de", None, 2], ["de", None, 2, "2"], ["en", 3]),
        (9007199254740993, [9007199254740993, "9007199254740993"], [9007199254740992]),
        ({"min": 2}, [2, 3.5, "2"], [1, None, "x", True, [2]]),
        ({"max": 2}, [2, -1e9, "-3"], [2.1, None, "NaN-"]),
        ({"min": 1, "max": 2}, [1, 2, "1.5"], [0, 3]),
        ({"not": "de"}, ["en", None, 3], ["de"]),
        ({"not": ["de", None]}, ["en", 0], ["de", None]),
        ({"min": 1, "not": 2}, [1, 3], [2, 0]),
    ],
)
def test_a_condition_lets_its_values_pass(condition: Any, passing: list[Any], failing: list[Any]) -> None:
    assert [failed_filter({"x": value}, {"x": condition}) for value in passing] == [None] * len(passing)
    assert [failed_filter({"x": value}, {"x": condition}) for value in failing] == ["x"] * len(failing)


def test_a_number_that_is_none_is_in_no_range() -> None:
    assert (
        failed_filter({"x": float("nan")}, {"x": {"min": 0}}) == failed_filter({"x": "nan"}, {"x": {"max": 1}}) == "x"
    )


def test_an_absent_column_is_null() -> None:
    assert failed_filter({}, {"x": None}) is None
    assert failed_filter({}, {"x": 1}) == "x"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_each_filter_leaves_out_is_counted_and_is_no_bad_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "p" * n, "n": n, "odd": n % 2 == 1} for n in range(1, 11)]
    rows[0]["prompt"] = 5  # a bad row, which the first filter leaves out
    options: dict[str, Any] = {"filters": {"n": {"min": 3}, "odd": False}, "filter_max_prompt_tokens": 8}
    path = write(tmp_path / "d.jsonl", rows)
    with caplog.at_level(logging.INFO):
        prompts = read_prompts(path, DataConfig(**options), TOKENIZER).used()
    assert [p.row for p in prompts] == [4, 6, 8]  # type: ignore[union-attr]
    assert f"{path}: data.filters leave out 6 of 10 rows (n: 2, odd: 4)" in caplog.text
    assert f"{path}: data.filter_max_prompt_tokens leaves out 1 rows" in caplog.text


def test_filters_that_leave_nothing_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "p"}] * 3)
    with pytest.raises(DataError, match=r"holds no usable row; .*; filters leave out 3 rows"):
        read_prompts(path, DataConfig(filters={"level": 1}), TOKENIZER).used()
