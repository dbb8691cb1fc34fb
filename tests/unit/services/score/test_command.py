"""`distillserve score` in this process against a scripted teacher on a real port; signals: tests/integration."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.cli import main
from services.score.command import read_shards
from tests.scripted_teacher import ScriptedTeacher, scores_of

ROWS = [
    {"prompt": "ab", "completion": "cde", "answer": 1},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {"token_ids": [5, 6, 7, 8], "prompt_length": 2},
    *({"prompt": f"{i}+{i}=", "completion": f"{2 * i}."} for i in range(150)),
]


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    with ScriptedTeacher().serving() as teacher:
        yield teacher


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["score", *arguments])
    out, err = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    return code, out, err


ScoreFile = Callable[..., tuple[int, str]]
"""Scores rows with further arguments; (exit code, last line on stderr)."""


@pytest.fixture
def score_file(tmp_path: Path, teacher: ScriptedTeacher, capsys: pytest.CaptureFixture[str]) -> ScoreFile:
    """Scores a file of rows into tmp_path/scores."""

    def score(rows: list[Any], *options: str) -> tuple[int, str]:
        file = write(tmp_path / "d.jsonl", rows)
        arguments = ("--input", file, "--output", str(tmp_path / "scores"), "--url", teacher.url, *options)
        code, _, err = run(capsys, *arguments)
        return code, err.strip().splitlines()[-1]

    return score


def test_a_pair_is_printed_token_by_token(
    teacher: ScriptedTeacher, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, "2+2=", "[b]4", "--url", teacher.url, "--top-k", "3", "--temperature", "0.5")
    body = {"sequences": [{"prompt": "2+2=", "completion": "[b]4"}], "top_k": 3, "temperature": 0.5}
    assert code == 0 and teacher.bodies == [body]
    scores = scores_of(body)
    lines = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    assert [line[1].strip() for line in lines] == list("[b]4")
    assert [line[2].strip() for line in lines] == [f"{value:.4f}" for value in scores.token_logprobs]
    assert all(line[3].strip() == "> 3" for line in lines)
    assert [line[4].strip() for line in lines] == [f"{value:.3f}" for value in scores.entropies]
    assert out.splitlines()[-1].startswith(f"total logprob {scores.token_logprobs.sum():.4f} over 4 tokens, perplexity")


def test_the_key_comes_from_the_environment(
    teacher: ScriptedTeacher, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLSERVE_TEACHER_KEY", "s3cret")
    run(capsys, "a", "b", "--url", teacher.url)
    assert teacher.keys == {"Bearer s3cret"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_row_of_a_file_is_scored_in_its_place(
    dtype: str,
    score_file: ScoreFile,
    tmp_path: Path,
    teacher: ScriptedTeacher,
) -> None:
    options = ("--top-k", "4", "--temperature", "2.0", "--shard-rows", "70", "--logprob-dtype", dtype)
    code, said = score_file(ROWS, *options)
    assert code == 0 and "3 shards, 153 sequences," in said
    assert teacher.num_asked == 153 and len(teacher.bodies) == 5  # 64 + 6, 64 + 6, 13
    scored = list(read_shards(tmp_path / "scores"))
    assert [row.row for row in scored] == list(range(1, 154))
    for row, asked in zip(scored, ROWS, strict=True):
        expected = scores_of({"sequences": [asked], "top_k": 4, "temperature": 2.0, "logprob_dtype": dtype})
        assert row.arrays.keys() == expected.columns().keys()
        for name, column in expected.columns().items():
            assert row.arrays[name].dtype == column.dtype
            np.testing.assert_array_equal(row.arrays[name], column, err_msg=name)
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["logprob_dtype"] == dtype and manifest["teacher"] == "scripted"


def test_a_finished_file_is_not_scored_again(score_file: ScoreFile, teacher: ScriptedTeacher) -> None:
    score_file(ROWS)
    asked = teacher.num_asked
    assert score_file(ROWS)[0] == 0
    assert teacher.num_asked == asked


def test_only_the_missing_shards_are_scored(score_file: ScoreFile, tmp_path: Path, teacher: ScriptedTeacher) -> None:
    score_file(ROWS, "--shard-rows", "50")

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir() if path.name != ".lock"}

    before = files()
    (tmp_path / "scores" / "scores-00001.safetensors").unlink()
    teacher.bodies.clear()
    score_file(ROWS, "--shard-rows", "50")
    assert teacher.num_asked == 50
    assert files() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top-k", "6"), "top_k = 5, now it is 6"),
        (("--temperature", "0.5"), "temperature = 1.0, now it is 0.5"),
        (("--logprob-dtype", "float16"), "logprob_dtype = 'float32', now it is 'float16'"),
        (("--shard-rows", "7"), "shard_rows = 1024, now it is 7"),
    ],
)
def test_other_settings_are_refused(
    options: tuple[str, ...], message: str, score_file: ScoreFile, teacher: ScriptedTeacher
) -> None:
    score_file(ROWS)
    asked = teacher.num_asked
    code, said = score_file(ROWS, *options)
    assert code == 2 and message in said and said.startswith("distillserve: --output ")
    assert teacher.num_asked == asked


def test_another_input_and_another_teacher_are_refused(score_file: ScoreFile, teacher: ScriptedTeacher) -> None:
    score_file(ROWS)
    code, said = score_file(ROWS[:-1])
    assert code == 2 and "input's sha256" in said
    teacher.info = teacher.info.model_copy(update={"fingerprint": "g"})
    code, said = score_file(ROWS)
    assert code == 2 and "fingerprint = 'f', now it is 'g'" in said


def too_long(body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """Completions that begin with an exclamation mark are too long."""
    for index, sequence in enumerate(body["sequences"]):
        if sequence.get("completion", "").startswith("!"):
            field = f"sequences.{index}.token_ids"
            return 422, {"detail": f"70 tokens in {field}, at most 64 are served", "field": field}
    return None


REFUSED = {"prompt": "a", "completion": "!!!"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [("{", "invalid JSON"), ({"prompt": "a"}, "expected either"), (REFUSED, "70 tokens in token_ids, at most 64")],
)
def test_a_bad_row_stops_with_its_number_and_the_shards_before_it(
    bad: Any,
    reason: str,
    score_file: ScoreFile,
    tmp_path: Path,
    teacher: ScriptedTeacher,
) -> None:
    teacher.refuse = too_long
    code, said = score_file([*ROWS[:25], bad, *ROWS[25:]], "--shard-rows", "10")
    assert code == 2 and f"{tmp_path}/d.jsonl, row 26: {reason}" in said and "--on-bad-row skip" in said
    assert [row.row for row in read_shards(tmp_path / "scores", partial=True)] == list(range(1, 21))


def test_bad_rows_are_skipped_counted_and_listed(
    score_file: ScoreFile, tmp_path: Path, teacher: ScriptedTeacher
) -> None:
    teacher.refuse = too_long
    rows = [REFUSED, ROWS[0], "{", ROWS[1], REFUSED, REFUSED, ROWS[2], REFUSED]
    code, said = score_file(rows, "--on-bad-row", "skip", "--shard-rows", "5")
    assert code == 0 and "3 sequences" in said and "5 bad rows skipped" in said
    assert [row.row for row in read_shards(tmp_path / "scores")] == [2, 4, 7]
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert manifest["num_bad_rows"] == 5
    assert [(bad["row"], bad["reason"].split()[0]) for bad in manifest["bad_rows"]] == [
        (1, "70"),
        (3, "invalid"),
        (5, "70"),
        (6, "70"),
        (8, "70"),
    ]
    code, said = score_file(rows, "--shard-rows", "5")  # what was skipped is not good now
    assert code == 2 and "row 1: 70 tokens" in said


def test_a_shard_of_bad_rows_alone_is_complete(score_file: ScoreFile, tmp_path: Path) -> None:
    code, _ = score_file(["{", "{", ROWS[0]], "--on-bad-row", "skip", "--shard-rows", "2")
    assert code == 0 and [row.row for row in read_shards(tmp_path / "scores")] == [3]


def test_a_problem_that_is_not_of_a_row_is_the_runs(score_file: ScoreFile, teacher: ScriptedTeacher) -> None:
    teacher.refuse = lambda body: (422, {"detail": "top_k = 999 in top_k, at most 261 are served", "field": "top_k"})
    code, said = score_file(ROWS, "--top-k", "999", "--on-bad-row", "skip")
    assert code == 4 and "top_k = 999" in said


def test_replicas_share_a_file_and_must_be_of_one_model(
    teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--input", write(tmp_path / "d.jsonl", ROWS), "--output", str(tmp_path / "s"), "--url", teacher.url)
    with ScriptedTeacher().serving() as other:
        assert run(capsys, *arguments, "--url", other.url)[0] == 0
        assert teacher.num_asked + other.num_asked == 153 and teacher.num_asked and other.num_asked
        other.info = other.info.model_copy(update={"fingerprint": "g"})
        code, _, err = run(capsys, *arguments, "--url", other.url)
    assert code == 2 and "do not serve the same model" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give PROMPT and COMPLETION, or --input FILE --output DIR"),
        (("a",), "give PROMPT and COMPLETION"),
        (("a", "b", "--shard-rows", "3"), "--shard-rows belongs to --input"),
        (("a", "b", "--output", "o"), "--output belongs to --input"),
        (("--input", "f"), "--output DIR is required"),
        (("a", "b", "--input", "f", "--output", "o"), "exclude each other"),
        (("a", "b", "--top-k", "0"), "'0' must be a whole number above 0"),
        (("a", "b", "--temperature", "0"), "--temperature = 0.0 must be between 0.01 and 100"),
        (("a", "b", "--temperature", "nan"), "--temperature = nan must be"),
        (("a", "b", "--outage-s", "0"), "--outage-s = 0.0 must be above 0"),
        (("a", "b", "--topk", "3"), "--topk is not an option"),
        (("--input", "/no/such", "--output", "o"), "cannot read /no/such"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("distillserve: ") and message in err


def test_a_teacher_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "a", "b", "--url", "http://127.0.0.1:9", "--outage-s", "0.1")
    assert code == 11 and "no teacher has answered for 0.1 s" in err and "http://127.0.0.1:9 cannot be reached" in err
