"""`up` with several ranks and several rollout servers, small scripts in the place of all of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.config import RunConfig
from services.errors import RankLostError
from services.gpus.advice import updated
from services.launch import ending, ranks, supervisor
from services.launch.supervisor import up
from tests.unit.services.launch.roles import (
    SERVER,
    Ranks,
    Roles,
    living,
    press_ctrl_c_twice,
    start_up,
    until,
    wait_until_nobody_lives,
)

BEGINS = "touch('out/config.json')\n"
IS_KILLED = "os.kill(os.getpid(), 9)"
IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
STAYS = "touch('stays'); time.sleep(600)"
NOTES_SIGNALS = """
def note(number, frame): touch(f"{rank}-got-{number}")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, note)
"""


@pytest.fixture
def two_ranks(config: RunConfig) -> RunConfig:
    return updated(config, "trainer", num_processes=2)


@pytest.fixture
def two_servers(config: RunConfig) -> RunConfig:
    return updated(config, "rollout", num_servers=2)


# ------------------------------------------------------------------------------------------------ what a rank is told

TELLS = """
inodes = [os.stat(f"/proc/self/fd/{fd}").st_ino for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
lock = os.environ["DISTILLSERVE_FOLDER_LOCK"].isdecimal() and os.stat(f"{folder}/out/.lock").st_ino in inodes
json.dump({**os.environ, "lock": str(lock)}, open(f"{folder}/trainer-{rank}.told", "w"))
print(f"rank {rank}")
"""
SERVER_TELLS = (
    "import json, os, sys; json.dump(dict(os.environ), open(f'{sys.argv[3]}/{sys.argv[1]}.told', 'w'))\n" + SERVER
)
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
OF_TORCHRUN = (*OF_A_RANK[:-1], "GROUP_RANK", "TORCHELASTIC_RUN_ID")


class Telling(Ranks):
    """Roles that write down what they are told."""

    def __call__(self, role: str, run_file: Path) -> list[str]:
        command = super().__call__(role, run_file)
        return [SERVER_TELLS if word == SERVER else word for word in command]


def told(folder: Path) -> dict[str, dict[str, str]]:
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.told")}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_every_rank_is_told_which_it_is_and_nobody_else_is_a_rank(
    two_ranks: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in OF_TORCHRUN:
        monkeypatch.setenv(name, "77")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ranks, "_num_cores", lambda: 6)
    assert up(two_ranks, Telling(tmp_path, TELLS, TELLS)) == 0
    seen = told(tmp_path)
    port = seen["trainer-0"]["MASTER_PORT"]
    assert port.isdecimal() and port not in ("77", str(two_ranks.rollout.port), str(two_ranks.teacher.port))
    for rank in "01":
        assert [seen[f"trainer-{rank}"][name] for name in OF_A_RANK] == [rank, rank, "2", "2", "127.0.0.1", port, "3"]
        assert seen[f"trainer-{rank}"]["lock"] == "True"
        assert not {"GROUP_RANK", "TORCHELASTIC_RUN_ID"} & seen[f"trainer-{rank}"].keys()
    for server in ("rollout", "teacher"):
        assert not {*OF_TORCHRUN, "OMP_NUM_THREADS"} & seen[server].keys()
    logs = {file.name: file.read_text() for file in (tmp_path / "out" / "logs").iterdir()}
    assert logs["trainer.log"] == "rank 0\n" and logs["trainer-1.log"] == "rank 1\n"
    assert "trainer rank" not in capfd.readouterr().out


def test_a_trainer_that_is_alone_is_no_rank(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in OF_TORCHRUN:
        monkeypatch.setenv(name, "0")
    assert up(config, Telling(tmp_path, TELLS)) == 0
    assert not {*OF_TORCHRUN, "OMP_NUM_THREADS"} & told(tmp_path)["trainer-0"].keys()


# ------------------------------------------------------------------------------------------------ how ranks end


def test_a_rank_that_is_killed_is_the_cause_and_not_what_the_others_say_of_it(
    two_ranks: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fails = "wait_until_lost(1); print('distillserve: lost rank 1'); sys.exit(1)"
    assert up(two_ranks, Ranks(tmp_path, BEGINS + fails, "print('at work')\n" + IS_KILLED)) == 137
    wait_until_nobody_lives(tmp_path)
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1].startswith("up      | the trainer's rank 1 was ended by SIGKILL, which this run did not send")
    assert lines[-2] == f"trainer rank 1 | these are the last lines of {tmp_path / 'out' / 'logs' / 'trainer-1.log'}"
    assert "trainer rank 1 | ... at work" in lines and not any("lost rank 1" in line for line in lines)


@pytest.mark.parametrize("consequence", ["sys.exit(1)", "os.abort()"])
def test_of_ranks_that_fail_the_first_is_the_cause(
    consequence: str, two_ranks: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    breaks = "print('distillserve: no GPU for rank 1'); sys.exit(5)"
    assert up(two_ranks, Ranks(tmp_path, f"wait_until_lost(1); {consequence}", breaks)) == 5
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "up      | the trainer's rank 1 failed: no GPU for rank 1"
    assert any("| the trainer's rank 1 exited with code 5; ending the others" in line for line in lines)


def test_a_rank_that_is_killed_just_after_another_has_failed_is_still_the_cause(
    two_ranks: RunConfig, tmp_path: Path
) -> None:
    assert up(two_ranks, Ranks(tmp_path, "sys.exit(1)", f"wait_until_lost(0); time.sleep(0.1); {IS_KILLED}")) == 137


def test_a_rank_that_has_lost_another_is_not_the_cause_although_it_ends_first(
    two_ranks: RunConfig, tmp_path: Path
) -> None:
    lost = f"sys.exit({RankLostError.exit_code})"
    assert up(two_ranks, Ranks(tmp_path, lost, "wait_until_lost(0); time.sleep(0.1); sys.exit(5)")) == 5


def test_rank_0_that_fails_is_named(two_ranks: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert up(two_ranks, Ranks(tmp_path, "sys.exit(7)", "wait_until_lost(0); sys.exit(1)")) == 7
    assert capfd.readouterr().out.splitlines()[-1] == "up      | the trainer's rank 0 exited with code 7"


def test_the_others_end_by_themselves_when_a_rank_is_lost(two_ranks: RunConfig, tmp_path: Path) -> None:
    ends = BEGINS + NOTES_SIGNALS + "wait_until_lost(1); time.sleep(1.5); touch('ended'); sys.exit(1)"
    assert up(two_ranks, Ranks(tmp_path, ends, "wait_for('out/config.json'); sys.exit(5)")) == 5
    assert (tmp_path / "ended").exists() and not list(tmp_path.glob("0-got-*"))


SAVES_LONG = """
touch("out/config.json")
wait_until_lost(1)
os.mkdir(f"{folder}/out/.student.part")
time.sleep(3)
os.rename(f"{folder}/out/.student.part", f"{folder}/out/student")
sys.exit(1)
"""


def test_a_rank_that_saves_the_student_has_the_time_for_it_when_another_is_lost(
    two_ranks: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    roles = Ranks(tmp_path, NOTES_SIGNALS + SAVES_LONG, "wait_for('out/config.json'); sys.exit(5)")
    assert up(two_ranks, roles, grace_s=0.5) == 5
    assert not list(tmp_path.glob("0-got-*"))
    assert f"student of the last finished step saved in {tmp_path / 'out' / 'student'}" in capfd.readouterr().out


def test_a_rank_that_does_not_notice_the_loss_of_another_is_ended(
    two_ranks: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Although a killed run has left half a student in the folder."""
    part = tmp_path / "out" / ".student.part"
    part.mkdir(parents=True)
    os.utime(part, (time.time() - 60, time.time() - 60))
    kill_1 = "wait_for('stays'); " + IS_KILLED
    started = time.monotonic()
    assert up(two_ranks, Ranks(tmp_path, IGNORES + BEGINS + STAYS, kill_1), grace_s=0.5) == 137
    assert time.monotonic() - started < 20
    wait_until_nobody_lives(tmp_path)
    out = capfd.readouterr().out
    assert "the trainer's rank 0 did not end within 0.5 s, killing it" in out and "saving the student" not in out


def test_a_lost_rank_leaves_nobody_longer_than_half_a_minute() -> None:
    waits = (ending.LAST_WORDS_S, ending.RANKS_GRACE_S, ending.TOLD_GRACE_S)
    assert sum(waits) <= 20  # the servers end after it


def test_a_run_is_complete_when_rank_0_is_and_waits_for_the_others(
    two_ranks: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    later = NOTES_SIGNALS + "wait_until_lost(0); time.sleep(1); touch('ended')"
    assert up(two_ranks, Ranks(tmp_path, "wait_for('rank-1.pids'); time.sleep(0.3)", later)) == 0
    assert (tmp_path / "ended").exists() and not list(tmp_path.glob("1-got-*"))
    assert "killing" not in capfd.readouterr().out


def test_a_rank_that_does_not_end_although_rank_0_is_done_is_killed(
    two_ranks: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(two_ranks, Ranks(tmp_path, "wait_for('stays')", IGNORES + STAYS), grace_s=0.5) == 0
    wait_until_nobody_lives(tmp_path)
    assert "the trainer's rank 1 did not end within 0.5 s, killing it" in capfd.readouterr().out


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_that_is_done_before_rank_0_does_not_end_the_run(
    code: int, two_ranks: RunConfig, tmp_path: Path
) -> None:
    acts = (f"wait_until_lost(1); time.sleep(1); touch('done'); sys.exit({code})", "pass")
    assert up(two_ranks, Ranks(tmp_path, *acts)) == code
    assert (tmp_path / "done").exists()


# ------------------------------------------------------------------------------------------------ signals


def start_ranks(config: RunConfig, tmp_path: Path, *acts: str, more: str = "") -> "subprocess.Popen[bytes]":
    """`up` as a process of its own, once rank 1 stays."""
    roles = f"Ranks(folder, {', '.join(map(repr, acts))}){more}"
    process = start_up(config, roles, tmp_path, stdout=subprocess.PIPE)
    for _ in until(30.0):
        assert process.poll() is None, "ended too early"
        if (tmp_path / "stays").exists() and (tmp_path / "rank-0.pids").exists():
            return process
    raise AssertionError


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_goes_to_rank_0_which_ends_the_others(
    number: int, code: int, two_ranks: RunConfig, tmp_path: Path
) -> None:
    leads = BEGINS + NOTES_SIGNALS + "wait_for('0-got-15'); time.sleep(1); touch('leave'); sys.exit(143)"
    follows = NOTES_SIGNALS + "touch('stays'); wait_for('leave'); time.sleep(0.5); touch('left')"
    process = start_ranks(two_ranks, tmp_path, leads, follows)
    os.kill(process.pid, number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == code and b"killing" not in said
    assert (tmp_path / "left").exists() and not list(tmp_path.glob("1-got-*"))
    wait_until_nobody_lives(tmp_path)


def test_a_rank_that_rank_0_leaves_behind_is_signalled_later(two_ranks: RunConfig, tmp_path: Path) -> None:
    follows = NOTES_SIGNALS + "touch('stays'); wait_for('1-got-15')"
    process = start_ranks(two_ranks, tmp_path, "time.sleep(600)", follows, more=", grace_s=1.0")
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and b"killing" not in said
    assert (tmp_path / "1-got-15").exists()


def test_a_second_ctrl_c_ends_all_ranks_at_once(two_ranks: RunConfig, tmp_path: Path) -> None:
    process = start_ranks(two_ranks, tmp_path, IGNORES + BEGINS + "time.sleep(600)", IGNORES + STAYS)
    for _ in until(30.0):
        if (tmp_path / "out" / "config.json").exists():
            break
    press_ctrl_c_twice(process)
    started = time.monotonic()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - started < 10
    assert b"the trainer's rank 0 is not waited for, killing it" in said
    assert b"the trainer's rank 1 is not waited for, killing it" in said
    wait_until_nobody_lives(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_no_rank_outlives_an_up_that_was_killed(two_ranks: RunConfig, tmp_path: Path) -> None:
    process = start_ranks(two_ranks, tmp_path, "time.sleep(600)", STAYS)
    process.kill()
    process.communicate(timeout=10)
    ranks_only = [tmp_path / f"rank-{rank}.pids" for rank in (0, 1)]
    for _ in until(10.0):
        if not set(living(tmp_path)) & {int(file.read_text()) for file in ranks_only}:
            break
    for pid in living(tmp_path):  # the servers' own children, which a real server ends itself
        os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------ rollout servers

SECOND_DIES = """
import json, os, sys, time
if json.load(open(sys.argv[2]))["rollout"]["seed"] == 1:
    import threading
    def die():
        while not os.path.exists(f"{sys.argv[3]}/trainer.pids"): time.sleep(0.01)
        print("MemoryError: too much", flush=True); os._exit(9)
    threading.Thread(target=die).start()
"""


def test_each_rollout_server_listens_on_its_own_port_and_the_trainer_knows_all(
    two_servers: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def command(role: str, run_file: Path) -> list[str]:
        if role == "trainer":
            return [
                sys.executable,
                "-c",
                "import shutil, sys; shutil.copy(*sys.argv[1:])",
                str(run_file),
                str(tmp_path / "read"),
            ]
        return Roles(tmp_path)(role, run_file)

    assert up(two_servers, command) == 0
    wait_until_nobody_lives(tmp_path)
    read = RunConfig.model_validate_json((tmp_path / "read").read_text())
    first, second = read.rollout_urls()
    assert first == two_servers.rollout.url() and second not in (first, *read.teacher_urls())
    lines = capfd.readouterr().out.splitlines()
    assert f"rollout | ready at {first}" in lines and f"rollout 2 | ready at {second}" in lines
    starts = lines.index("trainer | starting (usually 15 to 40 s)")
    assert max(index for index, line in enumerate(lines) if "| ready at" in line) < starts
    out = tmp_path / "out"
    assert sorted(file.name for file in (out / "logs").iterdir()) == [
        *("rollout-2.log", "rollout.log", "teacher.log", "trainer.log")
    ]
    assert [file.name for file in out.glob("*.json")] == ["run.json"] and not list(out.glob(".run*"))
    assert up(RunConfig.model_validate_json((out / "run.json").read_text()), Roles(tmp_path)) == 0


def test_one_rollout_server_of_two_that_dies_and_is_not_restarted_ends_the_run_and_is_named(
    two_servers: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def command(role: str, run_file: Path) -> list[str]:
        words = Roles(tmp_path, trainer_s=600)(role, run_file)
        return [SECOND_DIES + word if word == SERVER and role == "rollout" else word for word in words]

    assert up(updated(two_servers, "up", restart_servers=0), command) == 9
    wait_until_nobody_lives(tmp_path)
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "up      | the rollout server 2 failed: MemoryError: too much"
    assert lines[-2] == f"rollout 2 | these are the last lines of {tmp_path / 'out' / 'logs' / 'rollout-2.log'}"


@pytest.mark.parametrize("shared", [True, False])
def test_a_teacher_on_a_gpu_of_the_rollout_servers_starts_after_all_of_them(
    shared: bool,
    two_servers: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def is_shared(config: RunConfig) -> bool:
        return shared and config.rollout.port != two_servers.rollout.port  # the second server's GPU

    monkeypatch.setattr(supervisor, "servers_share_a_gpu", is_shared)
    assert up(two_servers, Roles(tmp_path)) == 0
    lines = capfd.readouterr().out.splitlines()
    ready = [index for index, line in enumerate(lines) if line.startswith("rollout") and "| ready at" in line]
    starts = next(index for index, line in enumerate(lines) if line.startswith("teacher | starting"))
    both = [index for index, line in enumerate(lines) if line.startswith("rollout") and "| starting" in line]
    assert len(ready) == len(both) == 2 and max(both) < min(ready)
    assert (max(ready) < starts) is shared
