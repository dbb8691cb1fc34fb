"""The command line over the run file over the defaults, and how quickly and in which words it answers."""

import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.unit.services.config.commands import assert_reads, assert_refused, refused, resolved

REFUSED = {
    "--loss 3": "loss ... dictionary ... 3",
    "--teacher.url http://me:s3cret@a:1": "--teacher.url is not an option ... --teacher_client.urls",
    "--loss.top_k": "--loss.top_k ... expected one argument ... distillserve up --help",
    "--loss.gama 0.5": "--loss.gama is not an option ... did you mean --loss.gamma?",
    "--los.gamma=0.5": "--los.gamma=0.5 is not an option ... did you mean --loss.gamma?",
    "--loss.gam 0.5": "--loss.gam is not an option ... did you mean --loss.gamma?",
    "run.toml left-over": "'left-over' ... too many",
}


@pytest.mark.parametrize(("options", "expected"), REFUSED.items())
def test_what_is_no_option_is_refused(options: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(options, expected, capsys)


def test_an_unknown_command_is_refused_and_the_known_ones_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert_reads(refused(capsys, "teach"), "'teach' ... 'rollout' ... 'teacher' ... distillserve --help")


GIVEN_TWICE: list[tuple[str, list[str], str, dict[str, Any]]] = [
    (
        "[loss]\ngamma = 0.25\ntop_k = 7\n",
        ["--loss.gamma", "0.5"],
        "loss",
        {"gamma": 0.5, "top_k": 7, "aggregation": "token_mean"},
    ),
    ("", ["--loss", '{"gamma": 0.25, "top_k": 7}', "--loss.top_k", "9"], "loss", {"gamma": 0.25, "top_k": 9}),
    (
        "[loss]\nadvantage_clip = 3.0\n",
        ["--loss.gamma", "1", "--loss.advantage_clip", "null"],
        "loss",
        {"advantage_clip": None},
    ),
    (
        '[teacher_client.named]\nmaths = ["http://a:1", "http://a:2"]\ncode = ["http://b:1"]\n',
        ["--teacher_client.named", '{"code": ["http://c:1"]}'],
        "teacher_client",
        {"named": {"maths": ["http://a:1", "http://a:2"], "code": ["http://c:1"]}},
    ),
]


@pytest.mark.parametrize(("content", "options", "section", "expected"), GIVEN_TWICE)
def test_the_command_line_wins_over_the_run_file_and_the_file_over_defaults(
    content: str,
    options: list[str],
    section: str,
    expected: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(content)
    found = resolved(capsys, "train", str(run_file), *options)[section]
    assert {name: found[name] for name in expected} == expected


def test_the_environment_sets_no_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("seed", "SEED", "DISTILLSERVE_SEED"):
        monkeypatch.setenv(name, "7")
    assert resolved(capsys, "train")["seed"] == 0


def test_help_answers_within_two_seconds_of_work() -> None:
    """By the processor's clock: a machine that is busy with other things is no fault of ours."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "services.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    for role in ("up", "rollout", "teacher", "train", "score", "push", "tiny"):
        assert f"    {role} " in done.stdout


@pytest.mark.parametrize(
    ("argv", "printed"),
    [
        (["train", "--help"], ["--loss.gamma", "examples:"]),
        (["--version"], [f"distillserve {version('distillserve')}\n"]),
    ],
)
def test_the_command_line_and_what_clients_import_load_no_model_library(argv: list[str], printed: list[str]) -> None:
    code = (
        "import sys, services.config, services.wire.rollout, services.wire.teacher, services.wire.weights\n"
        "import services.clients, services.score.command, services.cli\n"
        f"try: services.cli.main({argv!r})\n"
        "except SystemExit as ended: print(ended.code, file=sys.stderr)\n"
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stderr == "0\n[]\n"
    assert [text for text in printed if text not in done.stdout] == []
