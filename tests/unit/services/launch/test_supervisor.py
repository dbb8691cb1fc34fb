"""`up` with small scripts in the place of the roles: start, watch, end, leave nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.config import RunConfig
from services.errors import StartupError
from services.launch.supervisor import up
from tests.unit.services.launch.roles import (
    SERVER,
    SILENT,
    Replaced,
    Roles,
    living,
    press_ctrl_c_twice,
    start_up,
    state,
    until,
    wait_until_nobody_lives,
    wait_until_training,
)

# Ends after a while, and leaves a process behind that keeps its output open, as trackers and vLLM's engine can.
LEAVES_A_HOLDER = """
import os, subprocess, sys, time
holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(f"{sys.argv[1]}/holder.pids", "w").write(f"{os.getpid()} {holder.pid}")
time.sleep(1.0)
sys.exit(int(sys.argv[2]))
"""


def test_a_trainer_that_succeeds_ends_the_run_and_everybody_else(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(config, Roles(tmp_path)) == 0
    assert sorted(file.stem for file in tmp_path.glob("*.pids")) == ["rollout", "teacher", "trainer"]
    wait_until_nobody_lives(tmp_path)
    lines = capfd.readouterr().out.splitlines()
    logs = {file.stem: file.read_text() for file in (tmp_path / "out" / "logs").iterdir()}
    assert logs == {"rollout": "listening\n", "teacher": "listening\n", "trainer": "training\n"}
    starts = next(index for index, line in enumerate(lines) if line.startswith("trainer | starting"))
    ready = [index for index, line in enumerate(lines) if "| ready at http://127.0.0.1:" in line]
    assert len(ready) == 2 and max(ready) < starts
    assert not any("listening" in line or "training" in line for line in lines)


def test_verbose_shows_all_that_the_roles_say(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(config, Roles(tmp_path), verbose=True) == 0
    lines = capfd.readouterr().out.splitlines()
    assert {"rollout | listening", "teacher | listening", "trainer | training"} <= set(lines)


def test_the_exit_code_of_a_failing_trainer_is_the_runs(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(config, Roles(tmp_path, exit_code=5)) == 5
    wait_until_nobody_lives(tmp_path)
    out = capfd.readouterr().out
    assert "the trainer exited with code 5; ending the others" in out and "trainer | ... training" in out


@pytest.mark.parametrize("role", ["rollout", "teacher"])
def test_a_server_that_dies_at_start_ends_the_run(
    role: str, config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(config, Roles(tmp_path, trainer_s=600, dies=role)) == 9
    wait_until_nobody_lives(tmp_path)
    out = capfd.readouterr().out
    assert f"{role} | ... out of luck" in out and f"the {role} exited with code 9" in out.splitlines()[-1]
    assert f"the last lines of {tmp_path / 'out' / 'logs' / role}.log" in out


def test_a_child_that_ignores_sigterm_is_killed(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(config, Roles(tmp_path, ignores="teacher"), grace_s=0.5) == 0
    wait_until_nobody_lives(tmp_path)
    out = capfd.readouterr().out
    assert "the teacher did not end within 0.5 s, killing it" in out and "the rollout did not end" not in out


@pytest.mark.parametrize(
    ("role", "script", "code", "said"),
    [
        ("trainer", "import os; os.kill(os.getpid(), 9)", 137, "the trainer was ended by SIGKILL"),
        ("teacher", "pass", StartupError.exit_code, "the teacher exited with code 0"),
    ],
)
def test_a_role_that_ends_without_a_code_of_its_own_still_fails_the_run(
    role: str, script: str, code: int, said: str, config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(config, Replaced(tmp_path, role, script)) == code
    wait_until_nobody_lives(tmp_path)
    assert said in capfd.readouterr().out


def test_a_server_that_does_not_become_ready_in_time_is_named_and_everybody_ended(
    config: RunConfig, tmp_path: Path
) -> None:
    client = config.teacher_client.model_copy(update={"startup_timeout_s": 1.0})
    with pytest.raises(StartupError, match=r"the teacher server at http://127\.0\.0\.1:\d+ is not ready after 1 s"):
        up(config.model_copy(update={"teacher_client": client}), Replaced(tmp_path, "teacher", SILENT, str(tmp_path)))
    assert not (tmp_path / "trainer.pids").exists()
    wait_until_nobody_lives(tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("role", "exit_code"), [("trainer", 0), ("trainer", 6), ("rollout", 7)])
def test_a_process_that_keeps_the_output_open_does_not_hide_the_end_of_its_role(
    role: str, exit_code: int, config: RunConfig, tmp_path: Path
) -> None:
    script = (LEAVES_A_HOLDER, str(tmp_path), str(exit_code))
    started = time.monotonic()
    assert up(config, Replaced(tmp_path, role, *script)) == exit_code
    assert time.monotonic() - started < 20.0
    wait_until_nobody_lives(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_no_orphan(number: int, code: int, config: RunConfig, tmp_path: Path) -> None:
    process = start_up(config, "Roles(folder, trainer_s=600)", tmp_path)
    wait_until_training(process, tmp_path)
    os.kill(process.pid, number)
    assert process.wait(timeout=30) == code
    wait_until_nobody_lives(tmp_path)


def test_the_trainer_has_longer_than_the_servers_to_save_the_student(config: RunConfig, tmp_path: Path) -> None:
    roles = "Replaced(folder, 'trainer', SAVES, str(folder), '2'), grace_s=0.5"
    process = start_up(config, roles, tmp_path, stdout=subprocess.PIPE)
    wait_until_training(process, tmp_path)
    os.kill(process.pid, signal.SIGHUP)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 129 and (tmp_path / "saved").exists()
    assert b"saving the student first" in said and b"killing it" not in said
    wait_until_nobody_lives(tmp_path)


def test_a_second_ctrl_c_ends_everything_at_once(config: RunConfig, tmp_path: Path) -> None:
    roles = "Replaced(folder, 'trainer', SAVES, str(folder), '600')"
    process = start_up(config, roles, tmp_path, stdout=subprocess.PIPE)
    wait_until_training(process, tmp_path)
    press_ctrl_c_twice(process)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and b"the trainer is not waited for, killing it" in said
    wait_until_nobody_lives(tmp_path)


def test_ctrl_c_while_a_server_is_still_starting_leaves_no_orphan(config: RunConfig, tmp_path: Path) -> None:
    process = start_up(config, "Replaced(folder, 'teacher', SILENT, str(folder))", tmp_path)
    for _ in until(30.0):
        assert process.poll() is None, "ended too early"
        if (tmp_path / "silent.pids").exists():
            break
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert not (tmp_path / "trainer.pids").exists()
    wait_until_nobody_lives(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_roles_do_not_outlive_an_up_that_was_killed(config: RunConfig, tmp_path: Path) -> None:
    process = start_up(config, "Roles(folder, trainer_s=600)", tmp_path)
    wait_until_training(process, tmp_path)
    process.kill()
    process.wait(timeout=10)
    roles = [int((tmp_path / f"{role}.pids").read_text().split()[0]) for role in ("rollout", "teacher", "trainer")]
    for _ in until(10.0):
        if all(state(pid) == "Z" for pid in roles):
            break
    for pid in living(tmp_path):  # the servers' own children, which a real server ends itself
        os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(60)
def test_a_reader_that_goes_away_ends_the_run_without_a_traceback(config: RunConfig, tmp_path: Path) -> None:
    roles = "Replaced(folder, 'trainer', CHATTY), verbose=True"
    process = start_up(config, roles, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(timeout=30) == 128 + signal.SIGPIPE
    assert "Traceback" not in said and "never retrieved" not in said
    wait_until_nobody_lives(tmp_path)


def test_a_run_whose_port_is_taken_moves_and_leaves_the_new_port_in_its_file(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", config.teacher.port))
        listener.listen()
        assert up(config, Roles(tmp_path)) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    resolved, urls = run["teacher"], run["teacher_client"]["urls"]
    assert resolved["port"] != config.teacher.port
    assert urls == [f"http://127.0.0.1:{resolved['port']}"]
    out = capfd.readouterr().out
    assert f"teacher.port = {config.teacher.port} is in use, taking {resolved['port']}" in out
    assert f"teacher | ready at {urls[0]}" in out


def test_the_children_get_the_resolved_run(config: RunConfig, tmp_path: Path) -> None:
    up(config, Roles(tmp_path))
    resolved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert resolved["rollout_client"]["urls"] == [f"http://127.0.0.1:{resolved['rollout']['port']}"]
    assert RunConfig.model_validate(resolved).student.model == config.student.model


def test_the_run_file_of_an_earlier_run_stays_until_this_one_has_begun(config: RunConfig, tmp_path: Path) -> None:
    earlier = tmp_path / "out" / "run.json"
    earlier.parent.mkdir()
    earlier.write_text("earlier")
    assert up(config, Roles(tmp_path, exit_code=3)) == 3  # its trainer has not written a config.json
    assert earlier.read_text() == "earlier" and not list(earlier.parent.glob(".run.*"))
    begins = f"open({str(earlier.parent / 'config.json')!r}, 'w').close()"
    assert up(config, Replaced(tmp_path, "trainer", begins)) == 0
    assert RunConfig.model_validate_json(earlier.read_text()).student.model == config.student.model


def test_a_missing_model_is_refused_before_anything_starts(config: RunConfig, tmp_path: Path) -> None:
    missing = config.model_copy(update={"teacher": config.teacher.model_copy(update={"model": "/no/such/model"})})
    with pytest.raises(StartupError, match=r"teacher\.model"):
        up(missing, Roles(tmp_path))
    assert list(tmp_path.glob("*.pids")) == []


STRANGER = SERVER.replace('os.environ["DISTILLSERVE_LAUNCH"]', '"of somebody else"')
DIES_LATER = """
import os, signal, sys
open(f"{sys.argv[1]}/{sys.argv[2]}.pids", "a").write(f"{os.getpid()} ")
print("INFO: useless", "WARNING: chatter", "Traceback (most recent call last):", "MemoryError: too much", sep="\\n")
sys.stdout.flush()
os.kill(os.getpid(), int(sys.argv[3])) if int(sys.argv[3]) else sys.exit(1)
"""


def test_a_stranger_that_answers_on_the_port_is_not_taken_for_a_server_of_this_run(
    config: RunConfig, tmp_path: Path
) -> None:
    roles = Replaced(tmp_path, "teacher", STRANGER, "teacher", "RUN_FILE", str(tmp_path), "heeds")

    def command(role: str, run_file: Path) -> list[str]:
        return [str(run_file) if word == "RUN_FILE" else word for word in roles(role, run_file)]

    with pytest.raises(
        StartupError, match=r"another program answers at http://.*, where the teacher .*--teacher\.port"
    ):
        up(config, command)
    assert not (tmp_path / "trainer.pids").exists()
    wait_until_nobody_lives(tmp_path)


def test_a_role_that_is_killed_is_the_cause_in_the_last_lines_and_not_what_it_happened_to_say(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(config, Replaced(tmp_path, "teacher", DIES_LATER, str(tmp_path), "teacher", "9")) == 137
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1].startswith("up      | the teacher was ended by SIGKILL, which this run did not send")
    assert lines[-2] == f"teacher | these are the last lines of {tmp_path / 'out' / 'logs' / 'teacher.log'}"
    assert "teacher | ... MemoryError: too much" in lines and len(lines) < 25


def test_a_role_that_fails_by_an_exception_gives_it_as_the_cause(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(config, Replaced(tmp_path, "teacher", DIES_LATER, str(tmp_path), "teacher", "0")) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "up      | the teacher failed: MemoryError: too much"


def test_a_folder_in_which_another_run_works_is_refused_and_the_other_unharmed(
    config: RunConfig, tmp_path: Path
) -> None:
    process = start_up(config, "Roles(folder, trainer_s=600)", tmp_path)
    wait_until_training(process, tmp_path)
    log = tmp_path / "out" / "logs" / "trainer.log"
    for _ in until(30.0):  # what it said is written down by another thread
        if log.read_text():
            break
    before = log.read_text()
    second = config.model_copy(update={"output": config.output.model_copy(update={"overwrite": True})})
    with pytest.raises(
        StartupError, match=rf"output\.dir = .* is in use by `distillserve up` \(process {process.pid} "
    ):
        up(second, Roles(tmp_path / "second"))
    assert process.poll() is None and log.read_text() == before
    assert len(list((tmp_path / "out").glob(".run.*.json"))) == 1
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143


LOCKS = """
import os, sys
from pathlib import Path
from services.process.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1]), "output.dir", "`distillserve train`"):
    open(sys.argv[2], "w").close()
"""


def test_the_trainer_of_a_run_works_in_the_folder_that_up_holds(config: RunConfig, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    assert up(config, Replaced(tmp_path, "trainer", LOCKS, config.output.dir, str(locked))) == 0
    assert locked.exists()


def test_a_server_is_left_to_end_its_own_workers(config: RunConfig, tmp_path: Path) -> None:
    process = start_up(config, "Replaced(folder, 'rollout', LEADER, str(folder))", tmp_path)
    for _ in until(30.0):
        if (tmp_path / "silent.pids").exists():
            break
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert (tmp_path / "left-in-order").exists() and not (tmp_path / "worker-was-signalled").exists()
    wait_until_nobody_lives(tmp_path)


def test_a_start_that_is_given_up_ends_soon_although_a_role_ignores_it(config: RunConfig, tmp_path: Path) -> None:
    ignores = SILENT.replace("import os, sys, time", "import os, signal, sys, time; signal.signal(15, signal.SIG_IGN)")
    process = start_up(config, f"Replaced(folder, 'teacher', {ignores!r}, str(folder))", tmp_path)
    for _ in until(30.0):
        if (tmp_path / "silent.pids").exists():
            break
    os.kill(process.pid, signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(timeout=40) == 143
    assert time.monotonic() - started < 20
    wait_until_nobody_lives(tmp_path)


def test_a_run_file_does_not_say_what_nobody_set(config: RunConfig, tmp_path: Path) -> None:
    up(config, Roles(tmp_path))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["teacher"]["access_log"] is False


KEYS = """
import json, os, sys
names = [f"DISTILLSERVE_{role}_KEY{end}" for role in ("ROLLOUT", "TEACHER") for end in ("", "_FILE")]
json.dump({name: os.environ.get(name) for name in names}, open(sys.argv[1], "w"))
"""


def test_servers_of_a_run_have_keys_of_its_own_unless_the_environment_has_them(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DISTILLSERVE_ROLLOUT_KEY", raising=False)
    monkeypatch.delenv("DISTILLSERVE_TEACHER_KEY", raising=False)
    (tmp_path / "key").write_text("from-a-file\n")
    monkeypatch.setenv("DISTILLSERVE_TEACHER_KEY_FILE", str(tmp_path / "key"))
    seen = []
    for _ in range(2):
        assert up(config, Replaced(tmp_path, "trainer", KEYS, str(tmp_path / "seen"))) == 0
        seen.append(json.loads((tmp_path / "seen").read_text()))
    assert all(keys["DISTILLSERVE_TEACHER_KEY"] == "from-a-file" for keys in seen)
    assert not any(keys[f"DISTILLSERVE_{role}_KEY_FILE"] for keys in seen for role in ("ROLLOUT", "TEACHER"))
    ours = [keys["DISTILLSERVE_ROLLOUT_KEY"] for keys in seen]
    assert ours[0] != ours[1] and all(len(key) >= 32 for key in ours)
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    written += capfd.readouterr().out
    assert not any(key in written for key in [*ours, "from-a-file"])


HAS_LOCK = """
import json, os, sys
names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
json.dump([name.endswith("/.lock") for name in names], open(sys.argv[1], "w"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(("role", "holds"), [("teacher", False), ("trainer", True)])
def test_what_a_server_leaves_behind_does_not_hold_the_folder(
    role: str, holds: bool, config: RunConfig, tmp_path: Path
) -> None:
    up(config, Replaced(tmp_path, role, HAS_LOCK, str(tmp_path / "seen")))
    assert any(json.loads((tmp_path / "seen").read_text())) is holds


FOREIGN = """
import json
for _ in range(3000): print(json.dumps({"level": "INFO", "logger": None, "message": "x" * 100}))
"""


@pytest.mark.timeout(60)
def test_a_line_of_another_program_neither_stops_a_role_nor_its_log(config: RunConfig, tmp_path: Path) -> None:
    assert up(config, Replaced(tmp_path, "trainer", FOREIGN)) == 0
    assert len((tmp_path / "out" / "logs" / "trainer.log").read_text().splitlines()) == 3000


REMOVES = "import shutil, sys; shutil.rmtree(sys.argv[1])"


def test_a_folder_that_is_removed_meanwhile_does_not_change_how_a_run_ended(config: RunConfig, tmp_path: Path) -> None:
    assert up(config, Replaced(tmp_path, "trainer", REMOVES, config.output.dir)) == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    assert up(config, Replaced(tmp_path, "trainer", REMOVES + "; sys.exit(5)", config.output.dir)) == 5


# Serves, and ends by itself soon after the trainer has failed for want of it.
BREAKS_OFF = SERVER.replace(
    "http.server.HTTPServer(",
    "import threading, time\n"
    "def end():\n"
    "    while not os.path.exists(f'{folder}/broken'): time.sleep(0.01)\n"
    "    time.sleep(0.3); print('MemoryError: too much', flush=True); os._exit(9)\n"
    "threading.Thread(target=end).start()\n"
    "http.server.HTTPServer(",
)
MISSES = (
    "import sys; open(f'{sys.argv[1]}/broken', 'w').close(); print('distillserve: http://x broke off'); sys.exit(4)"
)


def test_a_server_that_ends_just_after_the_trainer_it_fails_is_the_cause(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def command(role: str, run_file: Path) -> list[str]:
        scripts = {"trainer": [MISSES, str(tmp_path)], "teacher": [BREAKS_OFF, role, str(run_file), str(tmp_path), ""]}
        return [sys.executable, "-c", *scripts[role]] if role in scripts else Roles(tmp_path)(role, run_file)

    assert up(config, command) == 9
    assert capfd.readouterr().out.splitlines()[-1] == "up      | the teacher failed: MemoryError: too much"


def test_a_role_that_cannot_be_started_is_one_line(config: RunConfig, tmp_path: Path) -> None:
    def command(role: str, run_file: Path) -> list[str]:
        return [str(tmp_path / "no-such-program")] if role == "teacher" else Roles(tmp_path)(role, run_file)

    with pytest.raises(StartupError, match=r"^the teacher cannot be started: No such file"):
        up(config, command)
    wait_until_nobody_lives(tmp_path)


def test_a_reader_that_is_gone_before_the_first_line_ends_the_run_in_order(config: RunConfig, tmp_path: Path) -> None:
    with socket.socket() as listener:  # the first line says that the port is taken
        listener.bind(("127.0.0.1", config.teacher.port))
        listener.listen()
        reading, writing = os.pipe()
        os.close(reading)
        process = start_up(config, "Roles(folder, trainer_s=600)", tmp_path, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGPIPE and b"Traceback" not in said
    wait_until_nobody_lives(tmp_path)


IGNORES_FOR_A_WHILE = SERVER.replace("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "pass").replace(
    'print("listening", flush=True)',
    "import time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), os._exit(0)))",
)


def test_the_end_of_a_slow_server_is_not_silent(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.launch.screen._SILENCE_S", 0.5)

    def command(role: str, run_file: Path) -> list[str]:
        script = [sys.executable, "-c", IGNORES_FOR_A_WHILE, role, str(run_file), str(tmp_path), ""]
        return script if role == "teacher" else Roles(tmp_path)(role, run_file)

    assert up(config, command) == 0
    assert "teacher | ending for 0:0" in capfd.readouterr().out
