"""`up` starts servers again that died. Small scripts are in the place of the roles; kills, signals and processes are real."""

import os
import re
import signal
from pathlib import Path

import pytest

from services.config import RunConfig
from services.errors import ConfigError, StartupError
from services.gpus.advice import updated
from services.launch import supervisor
from services.launch.supervisor import up
from tests.unit.services.launch.roles import Restarted, starts, state
from tests.unit.services.launch.up_process import KILLED, SAVES, Up, logs, quick


@pytest.mark.parametrize("role", ["rollout", "teacher"])
def test_a_server_that_is_killed_is_started_again_as_it_was_and_the_run_goes_on(
    role: str, config: RunConfig, tmp_path: Path
) -> None:
    run, name = Up(quick(config), tmp_path), f"{role}-{getattr(config, role).port}"
    run.kill(name)
    run.wait_until_said("ready again after")
    assert run.finish() == 0
    first, second = starts(tmp_path, name)
    assert first[0] != second[0] and first[1:] == second[1:]  # port, keys, the run that it belongs to
    assert len(starts(tmp_path, "trainer-0")) == 1
    _, _, died, ready, *_ = [line for line in run.lines() if line.startswith(role)]
    assert died == f"{role:<7} | starting again (1 of 3) in 0.1 s: the {role} {KILLED}"
    url = getattr(config, role).url()
    assert re.fullmatch(rf"{role:<7} \| ready again after \d+ s at {url}, its log is {role}\.2\.log", ready)
    assert logs(tmp_path) == sorted(["rollout.log", "teacher.log", "trainer.log", f"{role}.2.log"])


def test_what_a_dead_server_left_behind_is_gone_before_it_is_started_again(config: RunConfig, tmp_path: Path) -> None:
    run = Up(quick(config), tmp_path)
    leader, child = map(int, (tmp_path / "rollout.pids").read_text().split())
    os.kill(leader, signal.SIGKILL)
    run.wait_until_said("ready again after")
    assert state(child) == "Z"
    assert run.finish() == 0


def test_servers_that_die_at_once_are_all_started_again(config: RunConfig, tmp_path: Path) -> None:
    run = Up(quick(updated(config, "rollout", num_servers=2)), tmp_path)
    names = [file.stem for file in tmp_path.glob("*-*.starts") if not file.stem.startswith("trainer")]
    assert len(names) == 3
    for name in names:
        run.kill(name)
    run.wait_until_said("ready again after", times=3)
    assert run.finish() == 0
    assert [len(starts(tmp_path, name)) for name in names] == [2, 2, 2]
    assert any(
        line.startswith("rollout 2 | starting again (1 of 3) in 0.1 s: the rollout server 2") for line in run.lines()
    )
    assert {"rollout-2.log", "rollout-2.2.log", "rollout.2.log", "teacher.2.log"} < set(logs(tmp_path))


def test_a_server_that_goes_on_dying_ends_the_run_in_order_once_its_restarts_are_used_up(
    config: RunConfig, tmp_path: Path
) -> None:
    dies = "when('trainer.pids', lambda: die(9, 'MemoryError: too much'))"
    acts = {"trainer": {1: SAVES}, "teacher": dict.fromkeys((1, 2, 3), dies)}
    run = Up(quick(config, restart_servers=2), tmp_path, acts)
    assert run.end() == 9 and (tmp_path / "saved").exists()
    lines = run.lines()
    assert [line for line in lines if "again (" in line] == [
        "teacher | starting again (1 of 2) in 0.1 s: the teacher failed: MemoryError: too much",
        "teacher | starting again (2 of 2) in 0.2 s: the teacher failed: MemoryError: too much",
    ]
    assert "up      | the teacher exited with code 9, after 2 restarts; ending the others" in lines
    assert lines[-2:] == [
        f"teacher | these are the last lines of {tmp_path / 'out' / 'logs' / 'teacher.3.log'}",
        "up      | the teacher failed: MemoryError: too much",
    ]


def test_with_no_restarts_a_server_that_dies_ends_the_run(config: RunConfig, tmp_path: Path) -> None:
    run = Up(quick(config, restart_servers=0), tmp_path)
    run.kill(f"teacher-{config.teacher.port}")
    assert run.end() == 137 and run.lines()[-1] == f"up      | the teacher {KILLED}"
    assert not any("again" in line for line in run.lines())


@pytest.mark.parametrize("code", [ConfigError.exit_code, StartupError.exit_code])
def test_a_server_that_finds_its_options_wrong_when_it_is_started_again_is_not_tried_once_more(
    code: int, config: RunConfig, tmp_path: Path
) -> None:
    name = f"teacher-{config.teacher.port}"
    run = Up(quick(config), tmp_path, {"teacher": {2: f"die({code}, 'distillserve: no such model')"}})
    run.kill(name)
    assert run.end() == code and len(starts(tmp_path, name)) == 2
    assert run.lines()[-1] == "up      | the teacher failed: no such model"


def test_a_server_that_dies_on_its_way_back_is_started_again(config: RunConfig, tmp_path: Path) -> None:
    run = Up(quick(config), tmp_path, {"rollout": {2: "os.kill(os.getpid(), 9)"}})
    run.kill(f"rollout-{config.rollout.port}")
    run.wait_until_said("ready again after")
    assert run.finish() == 0
    assert [line.split(":")[0] for line in run.lines() if "again (" in line] == [
        "rollout | starting again (1 of 3) in 0.1 s",
        "rollout | starting again (2 of 3) in 0.2 s",
    ]


def test_a_server_that_dies_while_another_one_still_starts_is_started_again(config: RunConfig, tmp_path: Path) -> None:
    dies = "when('go', lambda: die(9))"
    late = f"""
while not os.path.exists(f"{{folder}}/rollout-{config.rollout.port}.starts"): time.sleep(0.01)
time.sleep(1); touch("go"); time.sleep(1)
"""
    run = Up(quick(config), tmp_path, {"rollout": {1: dies}, "teacher": {1: late}})
    run.wait_until_said("rollout | ready again after")
    assert run.finish() == 0


# Listens on a port as soon as that is free, for six seconds.
LISTENS = """
import socket, sys, time
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
open(f"{sys.argv[2]}-soon", "w").close()
for _ in range(30_000):
    try: listener.bind(("127.0.0.1", int(sys.argv[1]))); break
    except OSError: time.sleep(0.001)
listener.listen()
open(sys.argv[2], "w").close()
time.sleep(6)
"""


def test_a_port_that_is_free_a_moment_later_is_waited_for(config: RunConfig, tmp_path: Path) -> None:
    """Of a server that was killed a process may live for a moment that still listens there."""
    leaves = f"""
import subprocess
def leave():
    command = [sys.executable, "-c", {LISTENS!r}, str(port), f"{{folder}}/listens"]
    subprocess.Popen(command, start_new_session=True)
    wait_for("listens-soon"); os._exit(9)
when("leave", leave)
"""
    refuses = """
import socket
try:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); probe.bind(("127.0.0.1", port))
except OSError: die(3)
"""
    run = Up(quick(config, restart_backoff_s=1.0), tmp_path, {"rollout": {1: leaves, 2: refuses}})
    (tmp_path / "leave").touch()
    run.wait_until_said("ready again after")
    assert run.finish() == 0 and (tmp_path / "listens").exists()
    assert len(starts(tmp_path, f"rollout-{config.rollout.port}")) == 2


ONE_AFTER_ANOTHER = """
for role in ("rollout", "teacher"): wait_for(f"{role}-serves")
names = [f"{role}-{what}" for role in ("rollout", "teacher") for what in ("began", "serves")]
first, second, *_ = sorted(names, key=lambda name: os.path.getmtime(f"{folder}/{name}"))
sys.exit(0 if first.split("-")[0] == second.split("-")[0] else 77)
"""


@pytest.mark.parametrize(("shared", "code"), [(True, 0), (False, 77)])
def test_servers_on_one_gpu_start_again_one_after_another(
    shared: bool, code: int, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "servers_share_a_gpu", lambda config: shared)
    dies = "when('trainer.pids', lambda: os.kill(os.getpid(), 9))"
    slowly = "time.sleep(0.5); touch(f'{role}-began'); time.sleep(2); touch(f'{role}-serves')"
    acts = {role: {1: dies, 2: slowly} for role in ("rollout", "teacher")} | {"trainer": {1: ONE_AFTER_ANOTHER}}
    assert up(quick(config), Restarted(tmp_path, acts)) == code


def test_a_server_that_dies_just_after_the_trainer_that_misses_it_is_the_cause_and_not_started_again(
    config: RunConfig, tmp_path: Path
) -> None:
    acts = {
        "rollout": {1: "when('failed', lambda: (time.sleep(0.3), os.kill(os.getpid(), 9)))"},
        "trainer": {1: "touch('failed'); die(4, 'distillserve: http://x broke off')"},
    }
    run = Up(quick(config), tmp_path, acts)
    assert run.end() == 137 and run.lines()[-1] == f"up      | the rollout {KILLED}"
    assert not any("again" in line for line in run.lines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_a_pause_ends_everything_in_order_at_once(number: int, config: RunConfig, tmp_path: Path) -> None:
    """Also where the trainer saves for longer than the pause."""
    name = f"teacher-{config.teacher.port}"
    saves = SAVES.replace("touch(", "time.sleep(5); touch(")
    run = Up(quick(config, restart_backoff_s=3.0), tmp_path, {"trainer": {1: saves}})
    run.kill(name)
    run.wait_until_said("again (1 of 3) in 3 s")
    run.interrupt(number)
    assert (tmp_path / "saved").exists()
    assert len(starts(tmp_path, name)) == 1


def test_ctrl_c_while_a_server_comes_back_leaves_no_orphan(config: RunConfig, tmp_path: Path) -> None:
    name = f"teacher-{config.teacher.port}"
    run = Up(quick(config), tmp_path, {"trainer": {1: SAVES}, "teacher": {2: "time.sleep(600)"}})
    run.kill(name)
    run.wait_until_started(name, 2)
    run.interrupt()
    assert (tmp_path / "saved").exists()
    assert state(starts(tmp_path, name)[1][0]) == "Z"


def test_logs_of_an_earlier_run_in_the_folder_are_kept_unless_it_is_replaced(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "enough").touch()
    for expected in (["trainer.log"], ["trainer.2.log", "trainer.log"]):
        assert up(config, Restarted(tmp_path)) == 0
        assert [name for name in logs(tmp_path) if name.startswith("trainer")] == expected
    anew = updated(config, "output", overwrite=True)
    assert up(anew, Restarted(tmp_path)) == 0
    assert logs(tmp_path) == ["rollout.log", "teacher.log", "trainer.log"]
