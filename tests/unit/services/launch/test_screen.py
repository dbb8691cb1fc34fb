"""The console of a run: what is shown of its roles, and that it is never silent for long."""

import asyncio
import io
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services import logs
from services.launch import screen
from services.launch.panel import Stage
from services.launch.screen import Screen


def shows(tmp_path: Path, *, verbose: bool = False, on_reader_gone: Callable[[], None] = lambda: None) -> Screen:
    return Screen(verbose=verbose, metrics=tmp_path / "metrics.jsonl", on_reader_gone=on_reader_gone)


def line(level: int, message: str) -> str:
    record = logging.getLogger("services.clients.replicas").makeRecord(
        "services.clients.replicas", level, "f", 1, message, (), None
    )
    logs.add_request_id(record)
    return logs.TextFormatter().format(record)


def test_a_warning_is_shown_once_with_its_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = shows(tmp_path)
    for _ in range(3):
        console.role_said("trainer", line(logging.WARNING, "http://a is left alone [x]"))
    console.role_said("teacher", line(logging.ERROR, "scoring failed"))
    console.role_said("rollout", "/lib/x.py:3: FutureWarning: do not")
    assert capsys.readouterr().out.splitlines() == [
        "trainer | warning: http://a is left alone [x]",
        "teacher | error: scoring failed",
    ]


def test_a_warning_of_several_ranks_is_shown_once_with_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = shows(tmp_path)
    for rank in (1, 2):
        console.role_said(f"trainer rank {rank}", line(logging.WARNING, "no room"))
        console.role_said(f"trainer rank {rank}", line(logging.INFO, "loaded"))
    assert capsys.readouterr().out == "trainer rank 1 | warning: no room\n"


def test_verbose_shows_every_line_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shows(tmp_path, verbose=True).role_said("rollout", "\x1b[31m[bold]FutureWarning[/]\x1b[0m")
    assert capsys.readouterr().out == "rollout | [bold]FutureWarning[/]\n"


async def test_what_is_waited_for_is_said_when_nothing_else_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "_SILENCE_S", 0.2)
    monkeypatch.setattr(screen, "_POLL_S", 0.02)
    console = shows(tmp_path)
    console.stage("teacher", "ready", "at http://t")
    console.stage("rollout", "starting", "(usually 30 s)")
    running = asyncio.create_task(console.run())
    said = ""
    async with asyncio.timeout(20):
        while said.count("starting for") < 2:
            await asyncio.sleep(0.02)
            said += capsys.readouterr().out
    running.cancel()
    lines = said.splitlines()
    assert lines[:2] == ["teacher | ready at http://t", "rollout | starting (usually 30 s)"]
    assert all(re.fullmatch(r"rollout \| starting for 0:0\d", text) for text in lines[2:])


async def test_a_server_that_comes_back_is_said_rather_than_the_trainer_that_waits_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "_SILENCE_S", 0.0)
    monkeypatch.setattr(screen, "_POLL_S", 0.0)
    console = shows(tmp_path)
    for role, doing in [("rollout", "starting again (1 of 3)"), ("trainer", "training")]:
        console.stages[role] = Stage(doing, {"rollout": 200.0, "trainer": 100.0}[role])
    running = asyncio.create_task(console.run())
    for _ in range(20):
        await asyncio.sleep(0)
    running.cancel()
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith("rollout | starting again (1 of 3) for ") for line in lines)


async def test_a_trainer_that_says_nothing_is_seen_to_train_by_its_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "_SILENCE_S", 0.0)
    monkeypatch.setattr(screen, "_POLL_S", 0.0)
    console = shows(tmp_path)
    console.stage("trainer", "starting")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "num_steps": 9}\n')
    running = asyncio.create_task(console.run())
    said = ""
    async with asyncio.timeout(20):
        while "training for 0:0" not in said:
            await asyncio.sleep(0)
            said += capsys.readouterr().out
    running.cancel()


async def test_a_trainer_that_was_started_again_trains_once_it_writes_metrics_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "_SILENCE_S", 0.0)
    monkeypatch.setattr(screen, "_POLL_S", 0.0)
    console, metrics = shows(tmp_path), tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "num_steps": 9}\n')
    os.utime(metrics, (time.time() + 5, time.time() + 5))  # by the first attempt
    console.stage("trainer", "starting again (1 of 3)")
    console.stages["trainer"] = Stage("starting again (1 of 3)", time.monotonic() + 9)
    running, said = asyncio.create_task(console.run()), ""
    for _ in range(50):
        await asyncio.sleep(0)
    said = capsys.readouterr().out
    assert "starting again (1 of 3) for" in said and "training" not in said
    os.utime(metrics, (time.time() + 20, time.time() + 20))  # by the second
    async with asyncio.timeout(20):
        while "training for 0:0" not in said:
            await asyncio.sleep(0)
            said += capsys.readouterr().out
    running.cancel()


async def test_nothing_is_repeated_while_roles_are_ready_or_talk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "_SILENCE_S", 0.0)
    monkeypatch.setattr(screen, "_POLL_S", 0.0)
    console = shows(tmp_path)
    console.stage("teacher", "ready")
    running = asyncio.create_task(console.run())
    for _ in range(50):
        await asyncio.sleep(0)
    running.cancel()
    assert capsys.readouterr().out == "teacher | ready\n"


def test_a_disk_that_is_full_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        shows(tmp_path).say("to nobody")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # or the line fails once more when the file is closed


def test_a_reader_that_has_gone_away_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    gone: list[bool] = []
    with open(writing, "w", buffering=1) as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        shows(tmp_path, on_reader_gone=lambda: gone.append(True)).say("to nobody")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())
    assert gone == [True]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("file", "environment", "has_panel"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
    ],
)
def test_progress_is_said_where_no_panel_can_be_drawn(
    file: io.StringIO, environment: dict[str, str], has_panel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", file)
    console = shows(tmp_path)
    console.role_said("trainer", "01:02:03 INFO trainer.output.progress: step 3")
    assert console.has_panel is has_panel and ("step 3" in file.getvalue()) is not has_panel


def test_a_window_without_a_width_shows_what_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    shows(tmp_path).say("here")
    assert capsys.readouterr().out == "up      | here\n"


async def test_without_a_panel_a_trainer_that_says_nothing_is_known_to_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DISTILLSERVE_LOG_LEVEL=WARNING leaves its progress out."""
    monkeypatch.setattr(screen, "_SILENCE_S", 0.0)
    monkeypatch.setattr(screen, "_POLL_S", 0.01)
    console = shows(tmp_path)
    console.stage("trainer", "starting")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "num_steps": 2}\n')
    os.utime(tmp_path / "metrics.jsonl", (time.time() + 9, time.time() + 9))
    running, said = asyncio.create_task(console.run()), ""
    async with asyncio.timeout(20):
        while "trainer | training for 0:0" not in said:
            await asyncio.sleep(0.01)
            said += capsys.readouterr().out
    running.cancel()
