"""docs/data.md: its files are written, its commands are taken, its snippets run."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from services.config import RunConfig
from tests.unit.services.config.commands import resolved
from trainer.data.training_rows import read_rows
from trainer.tiny.pair import build_tokenizer

BLOCKS = re.findall(
    r"^```(\w+)(?: (\S+))?\n(.*?)^```", (Path(__file__).parents[4] / "docs" / "data.md").read_text(), re.M | re.S
)
COMPLETE = ["--student.model", "m", "--pipeline.steps", "1"]


def of_kind(kind: str) -> list[str]:
    return [text for found, _, text in BLOCKS if found == kind]


COMMANDS = [
    line.replace("\\\n", " ")
    for text in of_kind("sh")
    for line in re.findall(r"^distillserve (?:.*\\\n)*.*\n", text, re.M)
]


@pytest.fixture(autouse=True)
def files_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, name, text in BLOCKS:
        if name:
            (tmp_path / name).write_text(text)
    (tmp_path / "run.toml").write_text("")
    monkeypatch.chdir(tmp_path)


def test_the_page_has_examples_of_each_kind() -> None:
    assert [len(of_kind(kind)) for kind in ("sh", "toml", "python", "jsonl", "csv")] == [3, 1, 2, 1, 1]
    assert len(COMMANDS) == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_taken_and_read_its_files(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, role, run_file, *options = shlex.split(command)
    config = RunConfig.model_validate(resolved(capsys, role, run_file, *COMPLETE, *options))
    if "/" in (config.data.path or ""):  # on the hub
        return
    rows, held_out = read_rows(config.data, build_tokenizer(), seed=0)
    assert rows.fitting(999).stream(seed=0, shuffle=True).take(5)
    assert (held_out is not None) == config.data.has_held_out_rows


def test_its_run_file_mixes_and_holds_out() -> None:
    (text,) = of_kind("toml")
    config = RunConfig.model_validate(tomllib.loads(text))
    rows, held_out = read_rows(config.data, build_tokenizer(), seed=0)
    taken = rows.fitting(999).stream(seed=0, shuffle=True).take(300)
    assert 95 <= sum("language" in prompt.columns for prompt in taken) <= 105
    assert held_out is not None and len(held_out.prompts) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("text", of_kind("python"))
def test_its_snippets_run(text: str) -> None:
    exec(compile(text, "docs/data.md", "exec"), {})


def test_its_options_are_there() -> None:
    page = (Path(__file__).parents[4] / "docs" / "data.md").read_text()
    written = {*re.findall(r"`(data\.\w+)", page)}
    assert written and written <= {f"data.{name}" for name in RunConfig().data.model_dump()}


def test_every_row_of_its_files_is_an_object_or_a_record() -> None:
    rows: list[Any] = [json.loads(line) for text in of_kind("jsonl") for line in text.splitlines()]
    assert all("prompt" in row or "messages" in row for row in rows)
