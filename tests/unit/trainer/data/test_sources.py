"""The same rows are the same prompts, whatever they are kept in."""

import csv
import json
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from services.config import DataConfig
from services.errors import DataError
from trainer.data.prompts import Prompt, PromptRows, read_prompts
from trainer.tiny.pair import build_tokenizer

TOKENIZER = build_tokenizer()
ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "answer": "007"},
    {"prompt": 'a "quoted", cell\nof two lines', "answer": None},
    {"prompt": "Grüße, 世界 🎉", "answer": " 18 "},
    {"prompt": "NA", "answer": "null"},
    {"prompt": "1e3", "answer": "18.0"},
    {"prompt": " spaces\t", "answer": "true"},
]


def read(source: Any, **options: Any) -> PromptRows:
    return read_prompts(source, DataConfig(path=source if isinstance(source, str) else None, **options), TOKENIZER)


def ids(prompts: Any) -> list[tuple[list[int], str | None, list[int]]]:
    return [(p.token_ids, p.answer, p.answer_token_ids) for p in prompts]


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path.with_suffix(".jsonl"))


def _json(path: Path, rows: list[dict[str, Any]]) -> str:
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    return str(path.with_suffix(".json"))


def _separated(path: Path, rows: list[dict[str, Any]], separator: str) -> str:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, [*rows[0]], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def _parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


def _arrow(path: Path, rows: list[dict[str, Any]], new: Callable[..., Any]) -> str:
    table = pa.Table.from_pylist(rows)
    with new(str(path.with_suffix(".arrow")), table.schema) as writer:
        writer.write_table(table)
    return str(path.with_suffix(".arrow"))


def _saved(path: Path, rows: list[dict[str, Any]]) -> str:
    Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


FORMATS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": lambda path, rows: _separated(path.with_suffix(".csv"), rows, ","),
    "tsv": lambda path, rows: _separated(path.with_suffix(".TSV"), rows, "\t"),
    "parquet": _parquet,
    "arrow stream": lambda path, rows: _arrow(path, rows, pa.ipc.new_stream),
    "arrow file": lambda path, rows: _arrow(path, rows, pa.ipc.new_file),
    "save_to_disk": _saved,
    "object": lambda path, rows: Dataset.from_list(rows).with_format("numpy"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_rows_have_the_same_ids_in_every_format(form: str, tmp_path: Path) -> None:
    expected = ids(read(_jsonl(tmp_path / "expected", ROWS)).used())
    assert [text for _, text, _ in expected] == ["007", None, " 18 ", "null", "18.0", "true"]
    assert ids(read(FORMATS[form](tmp_path / "rows", ROWS)).used()) == expected


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
OTHER_CALL = {
    "type": "function",
    "function": {"name": "list", "arguments": {"of": ["y"]}},
}  # has no x, but a null in Arrow
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"x": "int"}}}]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "2+3"}], "tools": None},
    {
        "messages": [
            {"role": "user", "content": "é\n"},
            {"role": "assistant", "tool_calls": [CALL, OTHER_CALL]},
            {"role": "tool", "content": "5", "name": "add"},
        ],
        "tools": TOOLS,
    },
]


def _with_json_cells(path: Path, rows: list[dict[str, Any]]) -> str:
    cells = [{name: value and json.dumps(value) for name, value in row.items()} for row in rows]
    return _separated(path.with_suffix(".csv"), cells, ",")


@pytest.mark.parametrize("form", ["json", "parquet", "arrow file", "save_to_disk", "object", "csv"])
def test_conversations_have_the_same_ids_in_every_format(form: str, tmp_path: Path) -> None:
    """Arrow fills up the structs of messages with nulls; a cell of CSV holds them as JSON."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson(sort_keys=true) }}{% endfor %}"
    config = DataConfig()
    write = _with_json_cells if form == "csv" else FORMATS[form]
    expected = ids(read_prompts(_jsonl(tmp_path / "expected", CHATS), config, tokenizer).used())
    assert ids(read_prompts(write(tmp_path / "rows", CHATS), config, tokenizer).used()) == expected


def test_a_prompt_as_text_and_as_message_are_the_same_ids_if_the_template_adds_nothing(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    as_text = [{"prompt": "1+1="}, {"prompt": "é"}]
    as_chat = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in as_text]
    found = [
        ids(read_prompts(_jsonl(tmp_path / name, rows), DataConfig(), tokenizer).used())
        for name, rows in (("text", as_text), ("chat", as_chat))
    ]
    assert found[0] == found[1]


def test_whole_numbers_of_a_column_are_their_text_and_others_are_refused(tmp_path: Path) -> None:
    (prompt,) = read(_parquet(tmp_path / "whole", [{"prompt": "p", "answer": 18}])).used()
    assert prompt.answer == "18"  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"row 1: `answer` must be text, got float 18\.0; put it in quotes"):
        read(_parquet(tmp_path / "float", [{"prompt": "p", "answer": 18.0}]))


def test_columns_of_many_types_ride_along(tmp_path: Path) -> None:
    mixed = [{"prompt": "p", "extra": value} for value in (1, "1", [None, {"a": None}], {"b": 2.5}, None, True)]
    for write in (_jsonl, _json):
        prompts = read(write(tmp_path / "rows", mixed)).used()
        assert [p.columns for p in prompts] == [{"extra": row["extra"]} for row in mixed]  # type: ignore[union-attr]


BROKEN = [
    ("a.json", b'[{"prompt": "a"} {"prompt": "b"}]', "a.json, row 1: expected `,` or `]` behind it"),
    ("a.json", b'[{"prompt": "a"}, {]', "a.json, row 2: invalid JSON"),
    ("a.json", b'[{"prompt": "a"}', "a.json, row 1: expected `,` or `]`"),
    ("a.json", b"[]x", "a.json: text behind the end of the array"),
    ("a.json", b"[]", "holds no usable row"),
    ("a.json", b'[{"prompt": "a"}, 3]', "a.json, row 2: expected a JSON object, got int"),
    ("a.json", b'[{"prompt": "a", "prompt": "b"}]', "a.json, row 1: invalid JSON (prompt is given twice"),
    ("a.json", b'{"prompt": "a"}\n{"prompt": ""}', "a.json, row 2: `prompt` must be non-empty"),  # JSONL by its content
    ("a.json", b"\xff", "a.json: 'utf-8' codec can't decode"),
    ("a.csv", b"prompt,answer\na,1\n\nb,2,3\n", "a.csv, row 4: 3 cells under a header of 2 columns"),
    ("a.csv", b"prompt,answer\na\n", "a.csv, row 2: 1 cells under a header of 2 columns"),
    ("a.csv", b'prompt\n"a\nb', "a.csv, row 2: unexpected end of data"),
    ("a.csv", b'prompt\n"a"b\n', "a.csv, row 2: ',' expected after '\"'"),
    ("a.csv", b"prompt,prompt\na,b\n", "a.csv, row 1: the column 'prompt' is given twice"),
    ("a.csv", b'prompt,n\n"a\nb",1\n,2\n', "a.csv, row 4: neither `prompt` nor `messages` in the row (found: ['n'])"),
    ("a.csv", b"prompt\n\xff\n", "a.csv: 'utf-8' codec can't decode"),
    ("a.csv", b"", "holds no usable row"),
    ("a.parquet", b"no parquet", "cannot read data.path = "),
    ("a.parquet", b"", "cannot read data.path = "),
    ("a.arrow", b"no arrow", "cannot read data.path = "),
]


@pytest.mark.parametrize(("name", "content", "reason"), BROKEN)
def test_a_broken_file_is_one_line_with_its_name_and_row(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(reason)) as error:
        read(str(tmp_path / name)).used()
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    "name", ["n" * 5000, "none\0.csv", "none.jsonl", "none.csv", "none.json", "none.parquet", "none.arrow", "none", ""]
)
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name) if name else ""
    with pytest.raises(DataError, match=r"(?i)no such file|data\.path is empty|name too long|null byte"):
        read(path)


def test_datasets_itself_says_nothing_and_is_left_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one line of the error is enough; other code that uses `datasets` keeps its bars and its log."""
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    before = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError):
        read(str(tmp_path / "a.parquet"))
    assert not caplog.records
    assert (datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()) == before


def test_text_files_keep_what_other_readers_change(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfprompt,answer,level\r\n"x\r\ny",007,03\r\n\r\nNaN,,\r\n')
    prompts = read(str(tmp_path / "a.csv")).used()
    found = [(p.row, p.text, p.answer, p.columns) for p in prompts]  # type: ignore[union-attr]
    assert found == [(2, "x\r\ny", "007", {"level": "03"}), (5, "NaN", None, {"level": None})]


def folder(path: Path) -> str:
    path.mkdir()
    (path / "train-00000-of-00002.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    (path / "train-00001-of-00002.csv").write_text("prompt\nc\n")
    (path / "test.jsonl").write_text('{"prompt": "t"}\n')
    (path / "README.md").write_text("no data")
    return str(path)


def texts(prompts: Any) -> list[str]:
    return [p.text for p in prompts]


def test_a_folder_is_read_by_split_and_in_the_order_of_its_files(tmp_path: Path) -> None:
    path = folder(tmp_path / "rows")
    assert texts(read(path).used()) == ["a", "b", "c"]
    assert [p.row for p in read(path).used()] == [1, 2, 3]  # type: ignore[union-attr]
    assert texts(read(path, split="test").used()) == ["t"]
    with pytest.raises(DataError, match=r"data\.split = dev: .* has no such split, only train, test"):
        read(path, split="dev")
    with pytest.raises(DataError, match=r"has the splits train, test; choose one with data\.eval_split"):
        read_prompts(path, DataConfig(eval_path=path), TOKENIZER, option="data.eval_path")


def test_a_bad_row_of_a_folder_is_named_by_its_own_file_and_row(tmp_path: Path) -> None:
    path = folder(tmp_path / "rows")
    (tmp_path / "rows" / "train-00001-of-00002.csv").write_text("prompt,x\nc,1\n,2\n")
    with pytest.raises(DataError, match=r"train-00001-of-00002\.csv, row 3: neither"):
        read(path)
    skipping = read(path, on_bad_row="skip")
    assert texts(skipping.used()) == ["a", "b", "c"] and [*skipping.skipped] == [4]


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    for name in ("", "README.md"):
        if name:
            (tmp_path / "empty" / name).write_text("x")
        else:
            (tmp_path / "empty").mkdir()
        with pytest.raises(
            DataError, match=r"data\.path = .* is a folder without data files; rows are in files that end"
        ):
            read(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["r[1]", "a*", "a?b", "sp ace", "ü", "50%20"])
def test_names_are_no_patterns(name: str, tmp_path: Path) -> None:
    for other in ("r1", "ab", "aab"):
        with (tmp_path / f"{other}.parquet").open("wb") as file:
            pyarrow.parquet.write_table(pa.Table.from_pylist([{"prompt": "another file"}]), file)
    with (tmp_path / f"{name}.parquet").open("wb") as file:
        pyarrow.parquet.write_table(pa.Table.from_pylist([{"prompt": "a"}]), file)
    assert texts(read(str(tmp_path / f"{name}.parquet")).used()) == ["a"]
    assert texts(read(folder(tmp_path / name)).used()) == ["a", "b", "c"]


def test_what_save_to_disk_wrote_has_its_splits(tmp_path: Path) -> None:
    one, two = Dataset.from_list(ROWS[:1]), Dataset.from_list(ROWS[1:3])
    DatasetDict(train=one, validation=two).save_to_disk(str(tmp_path / "saved"))
    assert len(read(str(tmp_path / "saved")).used()) == 1  # type: ignore[arg-type]
    assert len(read(str(tmp_path / "saved"), split="validation").used()) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["config_name", "revision"])
def test_options_of_the_hub_are_refused_for_files_and_folders(option: str, tmp_path: Path) -> None:
    for path in (_jsonl(tmp_path / "rows", ROWS), folder(tmp_path / "folder")):
        with pytest.raises(DataError, match=rf"data\.{option} = x would be ignored: data\.path = .* leave it out"):
            read(path, **{option: "x"})


def test_a_split_of_a_single_file_is_refused(tmp_path: Path) -> None:
    assert read(_jsonl(tmp_path / "rows", ROWS), split="train").prompts
    with pytest.raises(DataError, match=r"data\.split = test: .* has no such split, only train"):
        read(_jsonl(tmp_path / "rows", ROWS), split="test")


class Opened:
    """What unpickling would do."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pandas", "data.py", "rows.npy", "rows.tar"])
def test_files_that_hold_code_are_not_opened(name: str, tmp_path: Path) -> None:
    """Neither pickled rows nor a loading script that has the folder's name, as older `datasets` ran them."""
    path = tmp_path / "data"
    path.mkdir()
    (path / name).write_bytes(b"raise AssertionError" if name.endswith("py") else pickle.dumps(Opened()))
    with pytest.raises(DataError, match="is a folder without data files"):
        read(str(path))
    (path / "train.jsonl").write_text('{"prompt": "a"}')
    assert texts(read(str(path)).used()) == ["a"]


def test_datasets_runs_no_script() -> None:
    """The version that is installed; a later one that does is noticed."""
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError)):
        datasets.load_dataset(str(Path(__file__)), trust_remote_code=True)


def test_the_hub_is_named_with_the_reason_when_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as error:
        read("someone/rows", config_name="main")
    said = str(error.value)
    assert said.startswith("cannot read data.path = someone/rows: ") and "\n" not in said
    assert "no file or folder here, so it was looked for on the hub" in said


def test_a_data_set_of_the_hub_is_asked_for_by_name_configuration_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` answers for real, with a folder in place of the hub."""
    load, asked = datasets.load_dataset_builder, []

    def load_from_folder(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return load(folder(tmp_path / "hub"), data_files={"train": "train*.jsonl", "test": "test.jsonl"})

    monkeypatch.setattr(datasets, "load_dataset_builder", load_from_folder)
    prompts = read("someone/rows", config_name="main", revision="v1").used()
    assert asked == [("someone/rows", {"name": "main", "revision": "v1"})]
    assert texts(prompts) == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{"prompt": "a"}], "train_dataset is a list; give a datasets.Dataset or IterableDataset"),
        (DatasetDict(train=Dataset.from_list(ROWS)), "train_dataset is a DatasetDict; give one of its splits, e.g. "),
    ],
)
def test_what_is_no_dataset_is_refused(given: Any, said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        read_prompts(given, DataConfig(), TOKENIZER, option="train_dataset")


def test_rows_of_an_object_are_numbered_from_one() -> None:
    prompts = read(Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])).used()
    assert [(p.row, p.text) for p in prompts] == [(1, "a"), (2, "b")]  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"data\.path, row 2: `prompt` must be non-empty"):
        read(Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]))


PREFERENCE = {"chosen": "yes", "rejected": "no"}
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "completion": "b"}, "a"),
    (
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        "<|user|>a",
    ),
    ({"prompt": "a", **PREFERENCE}, "a"),
    ({"prompt": "a", "completion": "b", "label": True}, "a"),
]


@pytest.mark.parametrize(("row", "text"), FORMS)
def test_completions_of_any_kind_are_columns_like_others(row: dict[str, Any], text: str, tmp_path: Path) -> None:
    (prompt,) = read(_jsonl(tmp_path / "rows", [row])).used()
    assert isinstance(prompt, Prompt) and prompt.text.startswith(text)
    assert prompt.answer is None and prompt.columns == {name: row[name] for name in row if name != "prompt"}


@pytest.mark.parametrize("row", [row for row, _ in FORMS[:2]])
def test_a_completion_is_the_answer_where_that_is_asked_for(row: dict[str, Any], tmp_path: Path) -> None:
    (prompt,) = read(_jsonl(tmp_path / "rows", [row]), answer_column="completion").used()
    assert prompt.answer == "b" and prompt.columns == {}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        (PREFERENCE, "these are preferences without a prompt of their own; split what both begin with"),
        (
            {"text": "The sky"},
            "`text` is for language modeling, which data.lm_path takes; if it is a prompt, pass --data.prompt",
        ),
    ],
)
def test_a_form_without_a_prompt_is_refused_with_what_to_do(row: dict[str, Any], advice: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(advice)):
        read(_jsonl(tmp_path / "rows", [row]))
