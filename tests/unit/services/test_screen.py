"""The console of a run: what is shown of its roles, and that it is never silent for long."""

import asyncio
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from services import logs, screen
from services.screen import Screen


def shows(tmp_path: Path, *, verbose: bool = False, on_reader_gone: Callable[[], None] = lambda: None) -> Screen:
    return Screen(verbose=verbose, metrics=tmp_path / "metrics.jsonl", on_reader_gone=on_reader_gone)


def line(level: int, message: str) -> str:
    record = logging.getLogger("services.replicas").makeRecord("services.replicas", level, "f", 1, message, (), None)
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
