"""Shards and their manifest: what is read back, what is refused, what an interrupted write leaves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.errors import ConfigError, DataError
from services.score.command import read_shards
from services.score.rows import InputFile
from services.score.shards import Manifest, ScoreSettings, resume, write_shard
from tests.scripted_teacher import scores_of

SETTINGS = ScoreSettings(
    protocol=1,
    teacher="m",
    fingerprint="f",
    tokenizer_fingerprint="t",
    temperature=0.7,
    top_k=2,
    logprob_dtype="float32",
    shard_rows=2,
    input=InputFile("d.jsonl", 99, "ab"),
)
BODY: dict[str, Any] = {
    "sequences": [{"prompt": "a", "completion": "bcd"}, {"prompt": "ab", "completion": "c"}],
    "top_k": 2,
}
SCORES = scores_of({**BODY, "temperature": 0.7})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two of three shards: lines 1 and 2, and of lines 3 and 4 none."""
    manifest = Manifest(SETTINGS, num_lines=5)
    manifest.shards[0] = write_shard(tmp_path, 0, 1, [1, 2], SCORES)
    manifest.shards[1] = write_shard(tmp_path, 1, 3, [], None)
    manifest.bad_rows = {4: "worse", 3: "bad"}
    manifest.write(tmp_path)
    return tmp_path


def test_a_manifest_says_what_the_shards_are(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    assert content["shards"][0] == {
        "file": "scores-00000.safetensors",
        "first_row": 1,
        "num_sequences": 2,
        "num_rows": 4,
        "num_bytes": (folder / "scores-00000.safetensors").stat().st_size,
    }
    assert (content["complete"], content["num_lines"], content["num_bad_rows"]) == (False, 5, 2)
    assert content["bad_rows"] == [{"row": 3, "reason": "bad"}, {"row": 4, "reason": "worse"}]
    assert content["input"] == {"name": "d.jsonl", "num_bytes": 99, "sha256": "ab"}
    expected = {"protocol": 1, "teacher": "m", "fingerprint": "f", "temperature": 0.7, "top_k": 2}
    assert {name: content[name] for name in expected} == expected


def test_what_was_written_is_read_back_line_by_line(folder: Path) -> None:
    rows = list(read_shards(folder, partial=True))
    assert [row.row for row in rows] == [1, 2]
    assert rows[0].arrays["token_ids"].tolist() == list(b"bcd")
    for name, column in SCORES.columns().items():
        for row, part in zip(rows, (slice(0, 3), slice(3, 4)), strict=True):
            np.testing.assert_array_equal(row.arrays[name], column[part], err_msg=name)


def test_an_unfinished_folder_is_read_only_where_that_is_meant(folder: Path) -> None:
    with pytest.raises(DataError, match="has 2 of 3 shards; run `distillserve score` again"):
        list(read_shards(folder))
    manifest = Manifest.read(folder)
    manifest.shards[2] = write_shard(
        folder, 2, 5, [5], scores_of({**BODY, "sequences": BODY["sequences"][:1], "temperature": 1.0})
    )
    manifest.write(folder)
    assert [row.row for row in read_shards(folder)] == [1, 2, 5]


def test_a_damaged_shard_is_named(folder: Path) -> None:
    path = folder / "scores-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"scores-00000\.safetensors cannot be read"):
        list(read_shards(folder, partial=True))


def test_the_same_settings_go_on_where_the_run_ended(folder: Path) -> None:
    manifest = resume(folder, replace(SETTINGS, teacher="moved", input=InputFile("renamed", 99, "ab")), 5)
    assert manifest.shards.keys() == {0, 1} and manifest.bad_rows == {3: "bad", 4: "worse"}
    assert manifest.settings.teacher == "moved"


def test_a_shard_that_is_gone_or_of_another_size_is_missing(folder: Path) -> None:
    (folder / "scores-00001.safetensors").unlink()
    assert resume(folder, SETTINGS, 5).shards.keys() == {0}
    (folder / "scores-00000.safetensors").write_bytes(b"half")
    assert resume(folder, SETTINGS, 5).shards.keys() == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "g"}, "fingerprint = 'f', now it is 'g'"),
        ({"tokenizer_fingerprint": "u"}, "tokenizer_fingerprint = 't'"),
        ({"temperature": 1.0}, "temperature = 0.7, now it is 1.0"),
        ({"top_k": 3}, "top_k = 2, now it is 3"),
        ({"logprob_dtype": "float16"}, "logprob_dtype = 'float32', now it is 'float16'"),
        ({"shard_rows": 3}, "shard_rows = 2, now it is 3"),
        ({"protocol": 2}, "protocol = 1, now it is 2"),
        ({"input": InputFile("d.jsonl", 99, "cd")}, "input's sha256 = 'ab', now it is 'cd'"),
    ],
)
def test_other_settings_are_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    with pytest.raises(ConfigError, match=message):
        resume(folder, replace(SETTINGS, **change), 5)
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"shards": 3}'])
def test_another_kind_of_manifest_is_refused(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json is not a manifest of scores"):
        resume(folder, SETTINGS, 5)


def test_a_folder_of_other_safetensors_is_refused(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"holds safetensors files but no manifest\.json"):
        resume(folder, SETTINGS, 5)
