"""`distillserve` on the command line, in this process: what it would run with, and what it refuses."""

import json
import re
from typing import Any

import pytest

from services.cli import main

COMPLETE = ["--student.model", "m", "--teacher.model", "t", "--data.path", "d.jsonl", "--pipeline.steps", "1"]


def resolved(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The options that a command would run with."""
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--dry-run"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    options: dict[str, Any] = json.loads(said.out)
    return options


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused command line prints; exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and said.startswith("distillserve: ")
    return said


def assert_refused(options: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`up` refuses options, as one types them after a complete command line, in a line that reads as expected."""
    assert_reads(refused(capsys, "up", *COMPLETE, *options.split(), "--dry-run"), expected)


def assert_reads(line: str, expected: str) -> None:
    """ "..." in what is expected stands for whatever is between."""
    assert re.search(".*".join(map(re.escape, expected.split(" ... "))), line), line


def assert_taken(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`up` takes options after a complete command line."""
    assert resolved(capsys, "up", *COMPLETE, *options.split())
