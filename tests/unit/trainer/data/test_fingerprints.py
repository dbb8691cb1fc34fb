"""Which rows a run reads: the same wherever their file lies, and others whatever in them has changed."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from services.config import DataConfig
from trainer.data.fingerprints import fingerprint_of_texts
from trainer.data.training_rows import read_rows
from trainer.tiny.pair import build_tokenizer

TOKENIZER = build_tokenizer()
ROWS: list[dict[str, Any]] = [{"prompt": f"p{number}", "answer": str(number)} for number in range(6)]


def fingerprints(tmp_path: Path, rows: list[dict[str, Any]], name: str = "d", room: int = 99, **options: Any) -> Any:
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training, _ = read_rows(DataConfig(path=str(path), on_bad_row="skip", **options), TOKENIZER, seed=0)
    return training.fitting(room).fingerprints()


@pytest.mark.parametrize("late", [False, True])
def test_rows_are_the_same_wherever_they_lie(late: bool, tmp_path: Path) -> None:
    options = {"tokenize_at_start": 0} if late else {}
    ((name, one),) = fingerprints(tmp_path, ROWS, **options)
    ((other_name, other),) = fingerprints(tmp_path, ROWS, "elsewhere", **options)
    assert one == other and (name, other_name) == (str(tmp_path / "d.jsonl"), str(tmp_path / "elsewhere.jsonl"))


CHANGES = {
    "another question": [*ROWS[:5], {"prompt": "q5", "answer": "5"}],
    "another order": [ROWS[1], ROWS[0], *ROWS[2:]],
    "a row less": ROWS[:5],
    "a row more": [*ROWS, {"prompt": "p6", "answer": "6"}],
    "a bad row before": [{"answer": "0"}, *ROWS],
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_rows_that_were_changed_are_others(change: str, late: bool, tmp_path: Path) -> None:
    options = {"tokenize_at_start": 0} if late else {}
    assert fingerprints(tmp_path, ROWS, **options) != fingerprints(tmp_path, CHANGES[change], **options)


def test_of_tokenised_rows_every_column_counts_and_those_that_do_not_fit_do_not(tmp_path: Path) -> None:
    whole = fingerprints(tmp_path, ROWS)
    assert fingerprints(tmp_path, [*ROWS[:5], ROWS[5] | {"answer": "6"}]) != whole
    assert fingerprints(tmp_path, [*ROWS[:5], ROWS[5] | {"topic": "sums"}]) != whole
    long = [*ROWS, {"prompt": "p" * 50}]
    assert fingerprints(tmp_path, long, room=10) == fingerprints(tmp_path, ROWS, room=10)


def test_each_source_has_its_own(tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"prompt": "m"}) + "\n")
    first, second = fingerprints(tmp_path, ROWS, more_paths={str(more): 1.0})
    assert first == fingerprints(tmp_path, ROWS)[0] and second[0] == str(more) and second[1] != first[1]


def test_of_what_can_only_be_read_once_nothing_is_known() -> None:
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    training, _ = read_rows(DataConfig(), TOKENIZER, seed=0, train_dataset=stream)
    assert training.fitting(99).fingerprints() == [["train_dataset", "a stream"]]
    training, _ = read_rows(DataConfig(), TOKENIZER, seed=0, train_dataset=Dataset.from_list(ROWS))
    assert training.fitting(99).fingerprints()[0][1] != "a stream"


def test_windows_are_told_apart_by_where_they_are_cut() -> None:
    found = {fingerprint_of_texts(windows) for windows in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[3], [1, 2]])}
    assert len(found) == 4 and fingerprint_of_texts([[1, 2], [3]]) in found
