"""Data sets in memory as files."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest

from services.config import DataConfig
from services.errors import DataError, OutputError
from trainer.data.dataset_file import write_dataset, write_rows
from trainer.data.prompts import read_prompts
from trainer.tiny.pair import build_tokenizer

ROWS = [{"prompt": "ä\n\u2028", "n": 1}, {"prompt": [{"role": "user", "content": "x"}], "n": None}]


def read(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


def test_rows_are_what_they_were(tmp_path: Path) -> None:
    assert read(write_rows("train_dataset", ROWS, tmp_path / "deep" / "rows.jsonl")) == ROWS
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["rows.jsonl"]


def test_a_dataset_and_a_stream_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "answer": n} for n in range(5)]
    dataset = datasets.Dataset.from_list(rows)
    folder, file = tmp_path / "deep" / "a", tmp_path / "b.jsonl"
    read_back = [
        read_prompts(path, DataConfig(path=path), build_tokenizer()).fitting(20)
        for path in (
            write_dataset(dataset.with_format("numpy"), folder),
            write_rows("train_dataset", dataset.to_iterable_dataset(), file, 3),
        )
    ]
    assert read_back[0][:3] == read_back[1] and len(read_back[0]) == 5
    assert [prompt.answer for prompt in read_back[1] if prompt is not None] == ["0", "1", "2"]
    assert [path.name for path in folder.parent.iterdir()] == ["a"]


def test_a_dataset_keeps_its_types_and_may_be_the_one_that_is_there(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "when": datetime(2020, 1, 1), "raw": b"\0"}]
    path = write_dataset(datasets.Dataset.from_list(rows), tmp_path / "rows")
    again = write_dataset(datasets.load_from_disk(path), tmp_path / "rows")
    assert datasets.load_from_disk(again).to_list() == rows


def test_a_dataset_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(OutputError, match=r"rows cannot be written"):
        write_dataset(datasets.Dataset.from_list(ROWS[:1]), tmp_path / "data" / "rows")


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
