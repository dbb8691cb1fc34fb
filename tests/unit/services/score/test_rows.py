"""What a line of a file to score may be, and how a file is cut into shards."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from services.errors import DataError
from services.score.rows import InputFile, parse_row, read_shards_of_rows

TEXT = {"prompt": "a", "completion": "b"}
IDS = {"token_ids": [1, 2, 3], "prompt_length": 1}
MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def parse(row: Any) -> dict[str, Any]:
    return parse_row(json.dumps(row).encode())


@pytest.mark.parametrize("row", [TEXT, IDS, MESSAGES])
def test_each_form_is_sent_as_it_is_without_the_other_columns(row: dict[str, Any]) -> None:
    assert parse({**row, "answer": 7, "source": "x"}) == row


USER, ASSISTANT = MESSAGES["messages"]


@pytest.mark.parametrize("row", [TEXT, IDS, MESSAGES])
def test_null_is_absent_in_every_column(row: dict[str, Any]) -> None:
    nulls = dict.fromkeys(("prompt", "completion", "messages", "tools", "token_ids", "prompt_length", "source"))
    assert parse({**nulls, **row}) == row


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "b"},
        {"prompt": "a", "completion": [ASSISTANT]},
    ],
)
def test_a_prompt_and_completion_of_messages_are_a_conversation(row: dict[str, Any]) -> None:
    assert parse({**row, "messages": None}) == MESSAGES


@pytest.mark.parametrize("row", [MESSAGES, {"prompt": [USER], "completion": [ASSISTANT]}])
@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]'])
def test_tools_go_with_messages(tools: Any, row: dict[str, Any]) -> None:
    assert parse({**row, "tools": tools}) == {**MESSAGES, "tools": tools}


@pytest.mark.parametrize("row", [TEXT, IDS])
def test_tools_beside_anything_else_are_a_column_like_others(row: dict[str, Any]) -> None:
    assert parse({**row, "tools": "hammer"}) == row


def test_a_prompt_beside_messages_is_a_column_like_others() -> None:
    assert parse({**MESSAGES, "prompt": "a"}) == MESSAGES


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "invalid JSON"),
        (b'"\xff"', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"{}", r"expected either .*, found \[\]"),
        (json.dumps({"prompt": "a"}).encode(), r"expected either .*, found \['prompt'\]"),
        (json.dumps({"completion": "a"}).encode(), "`prompt` is missing"),
        (json.dumps({"prompt": None, "completion": "a"}).encode(), "`prompt` is missing"),
        (json.dumps({"token_ids": [1, 2]}).encode(), "`prompt_length` is missing"),
        (json.dumps({**IDS, **TEXT}).encode(), "expected either"),
        (json.dumps({**MESSAGES, **TEXT}).encode(), "expected either"),
        (json.dumps({"prompt": "a", "completion": 4}).encode(), r"`completion`: .*\(got 4\)"),
        (json.dumps({"token_ids": [1, 2.5], "prompt_length": 1}).encode(), r"`token_ids\.1`: .*\(got 2\.5\)"),
        (json.dumps({"token_ids": [1, True], "prompt_length": 1}).encode(), r"`token_ids\.1`"),
        (json.dumps({"token_ids": [1, 2], "prompt_length": 0}).encode(), r"`prompt_length`: .*\(got 0\)"),
        (json.dumps({"messages": [{"role": "user"}]}).encode(), "`messages.0`: content must be text"),
        (rb'{"prompt": "a\ud800", "completion": "b"}', "half a surrogate pair"),
        (b'{"prompt": "a", "completion": "b", "completion": "c"}', "invalid JSON .completion is given twice"),
        (b'{"prompt": "a", "completion": "b", "weight": NaN}', "invalid JSON .NaN is no JSON number"),
        (json.dumps({"prompt": [USER], "completion": [ASSISTANT, USER]}).encode(), "`completion` has 2 messages"),
        (json.dumps({"prompt": [USER], "completion": []}).encode(), "`completion` has 0 messages"),
        (json.dumps({"prompt": [USER], "completion": 3}).encode(), "must be texts or lists of messages"),
        (json.dumps({"prompt": ["a"], "completion": "b"}).encode(), r"`messages\.0`: "),
        (json.dumps({**MESSAGES, "tools": 3}).encode(), r"`tools`: .*\(got 3\)"),
    ],
)
def test_a_bad_line_is_explained(line: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse_row(line)


def write(path: Path, lines: int, *, end: bytes = b"\n") -> Path:
    path.write_bytes(b"\n".join(json.dumps({**TEXT, "prompt": f"{i}"}).encode() for i in range(1, lines + 1)) + end)
    return path


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_file_is_known_by_its_bytes_and_its_lines_are_counted(end: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", 5, end=end)
    file, num_lines = InputFile.of(path)
    assert (file.name, file.num_bytes, num_lines) == ("d.jsonl", len(path.read_bytes()), 5)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_missing_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl: No such file"):
        InputFile.of(tmp_path / "none.jsonl")
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="is empty"):
        InputFile.of(tmp_path / "empty")


def test_lines_are_dealt_to_shards_by_their_number(tmp_path: Path) -> None:
    shards = list(read_shards_of_rows(write(tmp_path / "d", 7), 3, frozenset()))
    assert [(s.index, s.first_row, s.num_lines, s.rows) for s in shards] == [
        (0, 1, 3, [1, 2, 3]),
        (1, 4, 3, [4, 5, 6]),
        (2, 7, 1, [7]),
    ]
    assert [s["prompt"] for shard in shards for s in shard.sequences] == list("1234567")


def test_lines_of_shards_that_are_there_are_not_even_parsed(tmp_path: Path) -> None:
    path = write(tmp_path / "d", 7)
    path.write_bytes(b"broken\n" + path.read_bytes().split(b"\n", 1)[1])
    shards = list(read_shards_of_rows(path, 3, frozenset({0, 2})))
    assert [(s.index, s.rows, s.bad_rows) for s in shards] == [(1, [4, 5, 6], {})]


def test_bad_and_blank_lines_keep_the_numbers_of_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "d", 4)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"broken\n", b" \n", lines[3]]))
    (shard,) = read_shards_of_rows(path, 10, frozenset())
    assert (shard.rows, list(shard.bad_rows), shard.num_lines) == ([1, 4], [2], 4)


def test_a_bom_is_no_part_of_the_first_row_and_only_a_line_feed_ends_one(tmp_path: Path) -> None:
    row = b'{"prompt":\r"a", "completion": "b"}\r\n'
    (tmp_path / "d").write_bytes(b"\xef\xbb\xbf" + row + row)
    assert InputFile.of(tmp_path / "d")[1] == 2
    (shard,) = read_shards_of_rows(tmp_path / "d", 10, frozenset())
    assert (shard.sequences, shard.bad_rows) == ([TEXT, TEXT], {})
