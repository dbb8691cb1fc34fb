"""Sources of many rows: columns are checked at start, tokens are made when a row's turn comes."""

import errno
import json
import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from services.config import DataConfig
from services.errors import DataError
from trainer.data import line_cache, sources
from trainer.data.prompts import LatePrompts, PromptRows, first_prompts, read_prompts
from trainer.data.rows import RowReader
from trainer.data.stream import RowStream
from trainer.data.training_rows import read_rows
from trainer.tiny.pair import build_tokenizer

TOKENIZER = build_tokenizer()
LATE: dict[str, Any] = {"tokenize_at_start": 2}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{number}", "answer": str(number)} for number in range(count)]


def read(path: str, **options: Any) -> PromptRows:
    return read_prompts(path, DataConfig(path=path, **{**LATE, **options}), TOKENIZER)


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text file goes through the cache; returns the files that are converted."""
    paths: list[str] = []
    read_row_texts = line_cache.read_row_texts

    def noting(path: str, option: str) -> Any:
        paths.append(path)
        return read_row_texts(path, option)

    monkeypatch.setattr(sources, "CACHED_FROM_BYTES", 0)
    monkeypatch.setattr(line_cache, "read_row_texts", noting)
    return paths


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows whose columns are checked, in turn."""
    rows: list[dict[str, Any]] = []
    check = RowReader.check

    def noting(self: RowReader, content: dict[str, Any]) -> Any:
        rows.append(content)
        return check(self, content)

    monkeypatch.setattr(RowReader, "check", noting)
    return rows


def test_of_many_rows_only_those_are_tokenised_whose_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "d.jsonl", *numbered(20_000))
    encoded: list[int] = []
    encode = RowReader.encode

    def noting(self: RowReader, row: int, content: dict[str, Any]) -> Any:
        encoded.append(row)
        return encode(self, row, content)

    monkeypatch.setattr(RowReader, "encode", noting)
    rows, _ = read_rows(DataConfig(path=path), TOKENIZER, seed=0)
    batch = rows.fitting(99).stream(seed=0, shuffle=True).take(16)
    assert [prompt.row for prompt in batch] == encoded and len(encoded) == 16


def test_late_prompts_are_those_that_are_tokenised_at_start(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *numbered(30))
    late, early = read(path).fitting(99), read(path, tokenize_at_start=30).fitting(99)
    assert isinstance(late, LatePrompts) and isinstance(early, list)
    assert first_prompts(late, None) == early and late[3:5] == early[3:5]
    streams = [RowStream(prompts, seed=1, shuffle=True) for prompts in (late, early)]
    assert streams[0].take(70) == streams[1].take(70)


@pytest.mark.parametrize(
    "bad", [{"prompt": ""}, {"text": "p"}, {"prompt": "p", "answer": 1.5}, {"prompt": "p", "messages": []}]
)
def test_a_bad_column_of_many_rows_is_reported_at_start(bad: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *numbered(50), bad, *numbered(50))
    with pytest.raises(DataError, match=rf"{path}, row 51: .*; fix the row or pass --data\.on_bad_row skip"):
        read(path)


def test_a_row_that_turns_out_bad_stops_the_run_or_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "d.jsonl", *numbered(3), {"prompt": "much too long"}, {"prompt": "", "answer": "x"})
    stopping = RowStream(
        read(write(tmp_path / "e.jsonl", *numbered(3), {"prompt": "much too long"})).fitting(5), seed=0, shuffle=False
    )
    assert [prompt.text for prompt in stopping.take(3)] == ["p0", "p1", "p2"]
    with pytest.raises(DataError, match=r"e\.jsonl, row 4: the prompt has 13 tokens, more than the 5 .*; fix the row"):
        stopping.take(1)
    with caplog.at_level(logging.WARNING):
        skipping = RowStream(read(path, on_bad_row="skip").fitting(5), seed=0, shuffle=False)
        assert [prompt.text for prompt in skipping.take(4)] == ["p0", "p1", "p2", "p0"]
    assert "skipped 1 of 5 rows (row 5: `prompt` must be non-empty" in caplog.text
    assert "skipped 1 rows so far, the last one: " + path + ", row 4: the prompt has 13 tokens" in caplog.text
    assert skipping.position == 5


def test_long_prompts_that_a_filter_leaves_out_are_no_bad_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *numbered(3), {"prompt": "much too long"})
    stream = RowStream(read(path, filter_max_prompt_tokens=5).fitting(5), seed=0, shuffle=False)
    assert [prompt.text for prompt in stream.take(4)] == ["p0", "p1", "p2", "p0"]


def test_a_large_text_file_is_converted_and_checked_once(
    tmp_path: Path, converted: list[str], checked: list[dict[str, Any]]
) -> None:
    path = write(tmp_path / "d.jsonl", *numbered(9))
    first = first_prompts(read(path).fitting(99), None)
    assert converted == [path] and len(checked) == 18  # each once at start, once to tokenise it
    copy = write(tmp_path / "copy.jsonl", *numbered(9))
    again = read(copy)
    assert converted == [path] and len(checked) == 18
    assert first_prompts(again.fitting(99), None) == first


def test_other_content_and_other_options_are_not_taken_from_the_cache(
    tmp_path: Path, converted: list[str], checked: list[dict[str, Any]]
) -> None:
    path = write(tmp_path / "d.jsonl", *numbered(9))
    read(path)
    read(path, filters={"answer": ["1", "2", "3"]})
    assert len(converted) == 1 and len(checked) == 12
    write(tmp_path / "d.jsonl", *numbered(8), {"prompt": "new"})
    assert first_prompts(read(path).fitting(99), None)[-1].text == "new"
    assert len(converted) == 2
    write(tmp_path / "d.jsonl", *numbered(8), {"prompt": 3})
    assert read(path, on_bad_row="skip").skipped == {9: "`prompt` must be non-empty text or a list of messages, got 3"}
    with pytest.raises(DataError, match="row 9: `prompt` must be"):
        read(path)


def test_a_row_of_the_cache_is_named_by_its_line(tmp_path: Path, converted: list[str]) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\r\n\n{"prompt": "c"}\n{"prompt": "d"\n')
    with pytest.raises(DataError, match=r"d\.jsonl, row 6: invalid JSON"):
        read(str(tmp_path / "d.jsonl"))
    prompts = first_prompts(read(str(tmp_path / "d.jsonl"), on_bad_row="skip").fitting(9), None)
    assert [(prompt.row, prompt.text) for prompt in prompts] == [(1, "a"), (3, "b"), (5, "c")]


def test_a_broken_large_file_has_its_own_reason(tmp_path: Path, converted: list[str], datasets_cache: Path) -> None:
    (tmp_path / "d.csv").write_text("prompt,n\na,1\nb\n")
    with pytest.raises(DataError, match=r"d\.csv, row 3: 1 cells under a header of 2 columns"):
        read(str(tmp_path / "d.csv"))
    assert not [*datasets_cache.glob("**/*.arrow")]  # nothing half-written is found by the next run


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "rows are kept as Arrow in .*: make room or point HF_DATASETS_CACHE",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "point HF_DATASETS_CACHE at a folder that can"),
    ],
)
def test_a_cache_that_cannot_be_written_is_named(
    error: OSError, said: str, tmp_path: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", failing)
    with pytest.raises(DataError, match=said) as raised:
        read(write(tmp_path / "d.jsonl", *numbered(9)))
    assert "\n" not in str(raised.value) and "data.path = " in str(raised.value)


def test_without_a_place_for_its_result_the_check_runs_at_every_start(
    tmp_path: Path, datasets_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datasets_cache.write_text("a file where the folder should be")
    prompts = read(write(tmp_path / "d.jsonl", *numbered(9))).fitting(99)
    assert len(first_prompts(prompts, None)) == 9
    assert "d.jsonl is checked at every start: the cache of its result in" in caplog.text


def test_a_broken_cache_is_not_believed(datasets_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = datasets.Dataset.from_list(numbered(9))
    options = DataConfig(**LATE)
    read_prompts(dataset, options, TOKENIZER)
    (kept,) = datasets_cache.glob("distillserve/checked/*.arrow")
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(first_prompts(read_prompts(dataset, options, TOKENIZER).fitting(99), None)) == 9
    assert "is checked at every start" in caplog.text


def _first_of(path: str, cache: str, start: Any, found: Any) -> None:
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    sources.CACHED_FROM_BYTES = 0
    start.wait()
    found.put([prompt.text for prompt in first_prompts(read(path).fitting(99), 3)])


def test_runs_that_start_at_once_share_a_cache(tmp_path: Path, datasets_cache: Path) -> None:
    path, context = write(tmp_path / "d.jsonl", *numbered(3000)), multiprocessing.get_context("spawn")
    start, found = context.Barrier(3), context.Queue()
    runs = [context.Process(target=_first_of, args=(path, str(datasets_cache), start, found)) for _ in range(3)]
    for run in runs:
        run.start()
    assert [found.get(timeout=200) for _ in runs] == [["p0", "p1", "p2"]] * 3
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]


def test_held_out_rows_of_many_are_not_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *numbered(40))
    rows, held_out = read_rows(DataConfig(path=path, held_out=1, **LATE), TOKENIZER, seed=3)
    assert held_out is not None
    found: Callable[[Any], set[str]] = lambda prompts: {prompt.text for prompt in first_prompts(prompts, None)}  # noqa: E731
    kept, trained = found(held_out.fitting(99)), found(rows.fitting(99).parts[0])
    assert len(kept) == 1 and kept | trained == {f"p{number}" for number in range(40)} and not kept & trained
