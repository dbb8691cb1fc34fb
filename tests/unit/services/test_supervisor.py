"""`up` with small scripts in the place of the roles: start, watch, end, leave nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.config import RunConfig
from services.errors import StartupError
from services.supervisor import up, with_free_ports

# A server that answers /ready on the port that the run file gives it, and starts a child of its own, as vLLM does.
SERVER = """
import http.server, json, os, signal, subprocess, sys
role, run_file, folder, ignores = sys.argv[1:5]
if ignores == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(f"{folder}/{role}.pids", "w").write(f"{os.getpid()} {grandchild.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *args): pass
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", json.load(open(run_file))[role]["port"]), Handler).serve_forever()
"""
TRAINER = """
import os, sys, time
open(f"{sys.argv[1]}/trainer.pids", "w").write(str(os.getpid()))
print("training", flush=True)
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""
DIES = "import sys; print('out of luck'); sys.exit(9)"


class Roles:
    """A command factory: what each role does."""

    def __init__(self, folder: Path, *, trainer_s: float = 0.0, exit_code: int = 0, ignores: str = "", dies: str = ""):
        self._folder, self._trainer = str(folder), [str(trainer_s), str(exit_code)]
        self._ignores, self._dies = ignores, dies

    def __call__(self, role: str, run_file: Path) -> list[str]:
        if role == self._dies:
            return [sys.executable, "-c", DIES]
        if role == "trainer":
            return [sys.executable, "-c", TRAINER, self._folder, *self._trainer]
        ignores = "ignores" if role == self._ignores else "heeds"
        return [sys.executable, "-c", SERVER, role, str(run_file), self._folder, ignores]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    model = str(tmp_path / "model")
    return RunConfig(student={"model": model}, teacher={"model": model}, output={"dir": str(tmp_path / "out")})


def living(folder: Path) -> list[int]:
    pids = [int(pid) for file in folder.glob("*.pids") for pid in file.read_text().split()]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in _state(pid)]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_a_trainer_that_succeeds_ends_the_run_and_everybody_else(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(config, Roles(tmp_path)) == 0
    assert sorted(file.stem for file in tmp_path.glob("*.pids")) == ["rollout", "teacher", "trainer"]
    assert living(tmp_path) == []
    lines = capfd.readouterr().out.splitlines()
    assert "rollout | listening" in lines and "teacher | listening" in lines and "trainer | training" in lines
    ready = max(index for index, line in enumerate(lines) if "server is ready" in line)
    assert lines.index("trainer | training") > ready


def test_the_exit_code_of_a_failing_trainer_is_the_runs(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(config, Roles(tmp_path, exit_code=5)) == 5
    assert living(tmp_path) == []
    assert "the trainer exited with code 5" in capfd.readouterr().out


@pytest.mark.parametrize("role", ["rollout", "teacher"])
def test_a_server_that_dies_at_start_ends_the_run(
    role: str, config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert up(config, Roles(tmp_path, trainer_s=600, dies=role)) == 9
    assert living(tmp_path) == []
    out = capfd.readouterr().out
    assert f"{role} | out of luck" in out and f"the {role} exited with code 9" in out


def test_a_child_that_ignores_sigterm_is_killed(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.supervisor._GRACE_S", 0.5)
    assert up(config, Roles(tmp_path, ignores="teacher")) == 0
    assert living(tmp_path) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_no_orphan(number: int, code: int, config: RunConfig, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom services.config import RunConfig\n"
        "from services.supervisor import up\nfrom tests.unit.services.test_supervisor import Roles\n"
        "config = RunConfig.model_validate_json(sys.argv[1])\n"
        "sys.exit(up(config, Roles(Path(sys.argv[2]), trainer_s=600)))"
    )
    arguments = [sys.executable, "-c", script, config.model_dump_json(), str(tmp_path)]
    process = subprocess.Popen(arguments, cwd=Path(__file__).parents[3], start_new_session=True)
    for _ in _until(30.0):
        if (tmp_path / "trainer.pids").exists():
            break
    os.kill(process.pid, number)
    assert process.wait(timeout=30) == code
    assert living(tmp_path) == []


def _until(patience_s: float) -> Iterator[None]:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        yield
        time.sleep(0.05)
    raise AssertionError(f"did not happen within {patience_s} s")


def test_taken_ports_are_replaced_and_said(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        busy = config.model_copy(update={"rollout": config.rollout.model_copy(update={"port": port})})
        moved = with_free_ports(busy)
    assert moved.rollout.port not in (port, moved.teacher.port)
    assert moved.rollout.server_urls() == [f"http://127.0.0.1:{moved.rollout.port}"]
    assert f"rollout.port = {port} is in use, taking {moved.rollout.port}" in capsys.readouterr().out


def test_the_children_get_the_resolved_run(config: RunConfig, tmp_path: Path) -> None:
    up(config, Roles(tmp_path))
    resolved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert resolved["rollout"]["urls"] == [f"http://127.0.0.1:{resolved['rollout']['port']}"]
    assert RunConfig.model_validate(resolved).student.model == config.student.model


def test_a_missing_model_is_refused_before_anything_starts(config: RunConfig, tmp_path: Path) -> None:
    missing = config.model_copy(update={"teacher": config.teacher.model_copy(update={"model": "/no/such/model"})})
    with pytest.raises(StartupError, match=r"teacher\.model"):
        up(missing, Roles(tmp_path))
    assert list(tmp_path.glob("*.pids")) == []
