"""Data sets in memory as files."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest

from services.errors import DataError, OutputError
from trainer.data.dataset_file import write_rows

ROWS = [{"prompt": "ä\n\u2028", "n": 1}, {"prompt": [{"role": "user", "content": "x"}], "n": None}]


def read(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


def test_rows_are_what_they_were(tmp_path: Path) -> None:
    assert read(write_rows("train_dataset", ROWS, tmp_path / "deep" / "rows.jsonl")) == ROWS
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["rows.jsonl"]


def test_a_dataset_and_a_stream_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "answer": n} for n in range(5)]
    dataset = datasets.Dataset.from_list(rows)
    assert read(write_rows("train_dataset", dataset, tmp_path / "a")) == rows
    assert read(write_rows("train_dataset", dataset.to_iterable_dataset(), tmp_path / "b", 3)) == rows[:3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": ROWS}, r"train_dataset is a dict; .*choose one, e\.g\. dataset\['train'\]"),
        ("rows.jsonl", "train_dataset is a str"),
        (3, "train_dataset is a int"),
        ([ROWS[0], "text"], "train_dataset, row 2: a row is a dict, got a str"),
        ([{"a": datetime(2020, 1, 1)}], "row 1: the column 'a' holds a datetime that is no JSON"),
        ([{"a": float("nan")}], "row 1: the column 'a' holds a float that is no JSON"),
        ([{"a": object()}], "row 1: the column 'a' holds a object"),
        ([{1: "a"}], "row 1: the column 1 is not named by a text"),
    ],
)
def test_what_is_no_row_is_named_and_nothing_is_left(rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        write_rows("train_dataset", rows, tmp_path / "rows.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(OutputError, match=r"rows\.jsonl cannot be written"):
        write_rows("train_dataset", ROWS, tmp_path / "data" / "rows.jsonl")
