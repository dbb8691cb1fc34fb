"""Servers that a Python script starts: ready before it goes on, and gone when it ends, however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from services.config import RunConfig
from services.gpus.advice import updated
from tests.unit.services.launch.roles import living, until, wait_until_nobody_lives
from tests.unit.services.launch.script import MODULE

ROLES = "Roles(folder)"
FOR_EVER = "time.sleep(600)"


def start(config: RunConfig, folder: Path, act: str, roles: str = ROLES, **options: Any) -> "subprocess.Popen[str]":
    arguments = [*MODULE, str(folder), config.model_dump_json(), roles, act]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(arguments, cwd=Path(__file__).parents[4], start_new_session=True, **pipes)


def wait_until_ready(process: "subprocess.Popen[str]", folder: Path) -> None:
    for _ in until(60.0):
        assert process.poll() is None, process.communicate()
        if (folder / "ready").exists():
            return


def wait_until_servers_are_gone(folder: Path) -> None:
    """The scripts' own children are ended as a killed server's are: by the kernel for a real one, here by hand."""
    servers = [int((folder / f"{role}.pids").read_text().split()[0]) for role in ("rollout", "teacher")]
    for _ in until(20.0):
        if not set(servers) & set(living(folder)):
            break
    for pid in living(folder):
        os.kill(pid, signal.SIGKILL)


def test_the_block_has_servers_with_their_urls_and_keys_and_leaves_none(config: RunConfig, tmp_path: Path) -> None:
    act = """
import json
keys = [os.environ[f"DISTILLSERVE_{role}_KEY"] for role in ("ROLLOUT", "TEACHER")]
(folder / "seen.json").write_text(json.dumps([servers.config.rollout_client.urls, servers.config.teacher_client.urls, keys]))
"""
    process = start(config, tmp_path, act)
    said, errors = process.communicate(timeout=90)
    assert process.returncode == 0, said + errors
    rollout, teacher, keys = json.loads((tmp_path / "seen.json").read_text())
    assert rollout == [config.rollout.url()] and teacher == [config.teacher.url()]
    assert all(len(key) > 20 for key in keys) and keys[0] != keys[1]
    wait_until_nobody_lives(tmp_path)
    lines = said.splitlines()
    assert f"rollout | ready at {rollout[0]}" in lines and f"teacher | ready at {teacher[0]}" in lines
    assert any(line.startswith("rollout | starting (usually") for line in lines)
    assert not any(key in said + errors for key in keys) and errors == ""
    assert {file.name for file in (tmp_path / "out" / "logs").iterdir()} == {"rollout.log", "teacher.log"}


def test_an_error_in_the_block_ends_the_servers(config: RunConfig, tmp_path: Path) -> None:
    process = start(config, tmp_path, "raise ValueError('mine')")
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1 and errors.splitlines()[-1] == "ValueError: mine"
    wait_until_nobody_lives(tmp_path)


def test_ctrl_c_ends_the_servers(config: RunConfig, tmp_path: Path) -> None:
    process = start(config, tmp_path, FOR_EVER)
    wait_until_ready(process, tmp_path)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and errors.splitlines()[-1] == "KeyboardInterrupt"
    wait_until_nobody_lives(tmp_path)


def test_ctrl_c_while_the_servers_start_ends_them(config: RunConfig, tmp_path: Path) -> None:
    process = start(config, tmp_path, FOR_EVER, "Replaced(folder, 'teacher', SILENT, str(folder))")
    for _ in until(60.0):
        if (tmp_path / "silent.pids").exists():
            break
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and not (tmp_path / "ready").exists()
    wait_until_nobody_lives(tmp_path)


def test_a_second_ctrl_c_does_not_wait_for_a_server_that_does_not_end(config: RunConfig, tmp_path: Path) -> None:
    process = start(config, tmp_path, FOR_EVER, "Roles(folder, ignores='teacher')")
    wait_until_ready(process, tmp_path)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.4)  # the servers' second has begun
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    wait_until_nobody_lives(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_script_that_is_killed_takes_its_servers_along(number: int, config: RunConfig, tmp_path: Path) -> None:
    process = start(config, tmp_path, FOR_EVER)
    wait_until_ready(process, tmp_path)
    os.kill(process.pid, number)
    process.communicate(timeout=30)
    wait_until_nobody_lives(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_script_that_is_killed_while_a_fork_of_it_lives_takes_its_servers_along(
    config: RunConfig, tmp_path: Path
) -> None:
    """The fork holds the pipe open at whose end the servers would notice."""
    act = f"pid = os.fork()\n(folder / 'fork.txt').write_text(str(pid or os.getpid()))\n{FOR_EVER}"
    process = start(config, tmp_path, act, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in until(60.0):
        if (tmp_path / "fork.txt").exists():
            break
    process.kill()
    process.wait()
    try:
        wait_until_nobody_lives(tmp_path)
    finally:
        os.kill(int((tmp_path / "fork.txt").read_text()), signal.SIGKILL)


def test_the_watching_process_that_is_killed_is_told_and_takes_its_servers_along(
    config: RunConfig, tmp_path: Path
) -> None:
    act = "servers.tell(lambda error: (folder / 'told').write_text(str(error)))\nos.kill(servers._process.pid, 9)\n"
    process = start(config, tmp_path, act + "\nfor _ in until(20.0):\n    if (folder / 'told').exists(): break")
    said, errors = process.communicate(timeout=90)
    assert process.returncode == 0, said + errors
    assert (tmp_path / "told").read_text() == "the process that watches the servers was killed"
    wait_until_servers_are_gone(tmp_path)


def test_a_server_that_dies_at_start_is_the_error_with_its_last_lines(config: RunConfig, tmp_path: Path) -> None:
    process = start(config, tmp_path, "", "Roles(folder, dies='rollout')")
    said, errors = process.communicate(timeout=90)
    assert errors.splitlines()[-1] == "services.errors.PeerError: the rollout exited with code 9"
    assert "rollout | ... out of luck" in said and not (tmp_path / "ready").exists()
    wait_until_nobody_lives(tmp_path)


def test_a_server_that_dies_later_and_is_not_restarted_is_told_to_the_run(config: RunConfig, tmp_path: Path) -> None:
    act = """
servers.tell(lambda error: (folder / "told").write_text(f"{type(error).__name__}: {error}"))
os.kill(int((folder / "teacher.pids").read_text().split()[0]), 9)
for _ in until(20.0):
    if (folder / "told").exists(): break
assert str(servers.lost()) in (folder / "told").read_text()
"""
    process = start(updated(config, "up", restart_servers=0), tmp_path, act)
    said, errors = process.communicate(timeout=90)
    assert process.returncode == 0, said + errors
    assert (tmp_path / "told").read_text().startswith("PeerError: the teacher was ended by SIGKILL")
    wait_until_nobody_lives(tmp_path)


def test_a_server_that_dies_later_is_started_again_and_the_script_sees_it(config: RunConfig, tmp_path: Path) -> None:
    act = """
servers.tell(lambda error: (folder / "told").touch())
name = f"teacher-{servers.config.teacher.port}"
os.kill(starts(folder, name)[0][0], 9)
for _ in until(20.0):
    if len(starts(folder, name)) == 2 and screen._screen.stages["teacher"].doing == "ready": break
assert servers.lost(0.5) is None and not (folder / "told").exists()
"""
    process = start(updated(config, "up", restart_backoff_s=0.1), tmp_path, act, "Restarted(folder)")
    said, errors = process.communicate(timeout=90)
    assert process.returncode == 0, said + errors
    lines = [line for line in said.splitlines() if line.startswith("teacher")]
    assert lines[2].startswith("teacher | starting again (1 of 3) in 0.1 s: the teacher was ended by SIGKILL")
    assert lines[3].startswith("teacher | ready again after ") and lines[3].endswith("its log is teacher.2.log")
    wait_until_nobody_lives(tmp_path)


def test_what_up_refuses_is_refused_with_the_same_error(config: RunConfig, tmp_path: Path) -> None:
    wrong = config.model_copy(update={"teacher": config.teacher.model_copy(update={"model": "/no/such/model"})})
    process = start(wrong, tmp_path, "")
    _, errors = process.communicate(timeout=90)
    assert errors.splitlines()[-1].startswith("services.errors.StartupError: teacher.model = '/no/such/model'")
    assert not list(tmp_path.glob("*.pids"))


def test_a_program_that_trains_itself_is_not_started_again(config: RunConfig, tmp_path: Path) -> None:
    process = start(updated(config, "up", restart_trainer=1), tmp_path, "")
    _, errors = process.communicate(timeout=90)
    assert errors.splitlines()[-1].startswith("services.errors.ConfigError: up.restart_trainer = 1 would be ignored")
    assert not list(tmp_path.glob("*.pids"))


def test_a_server_does_not_know_of_the_ranks_of_its_script(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    script = "import os, sys; open(sys.argv[1], 'w').write(str(sorted(set(os.environ) & {'RANK', 'WORLD_SIZE'}))); sys.exit(3)"
    roles = f"Replaced(folder, 'teacher', {script!r}, str(folder / 'seen'))"
    start(config, tmp_path, "", roles).communicate(timeout=90)
    assert (tmp_path / "seen").read_text() == "[]"
