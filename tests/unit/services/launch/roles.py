"""Small scripts in the place of the roles of `up`, and what tests of it do with them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.config import RunConfig

# A server that answers /ready on the port that the run file gives it, and starts a child of its own, as vLLM does.
SERVER = """
import http.server, json, os, signal, subprocess, sys
role, run_file, folder, ignores = sys.argv[1:5]
if ignores == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(f"{folder}/{role}.pids", "a").write(f"{os.getpid()} {grandchild.pid} ")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0")
        self.send_header("x-distillserve-launch", os.environ["DISTILLSERVE_LAUNCH"]); self.end_headers()
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
SILENT = """
import os, sys, time
open(f"{sys.argv[1]}/silent.pids", "w").write(str(os.getpid()))
time.sleep(600)
"""
# Saves for a while when it is told to end, or for ever.
SAVES = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(float(sys.argv[2]))
    open(f"{sys.argv[1]}/saved", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
open(f"{sys.argv[1]}/out/config.json", "w").close()
open(f"{sys.argv[1]}/trainer.pids", "w").write(str(os.getpid()))
time.sleep(600)
"""
CHATTY = "while True: print('x' * 1000)"
LEADER = """
import os, signal, subprocess, sys, time
child = "import signal, sys, time\\nsignal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1], 'w').close())\\ntime.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", child, f"{sys.argv[1]}/worker-was-signalled"])
def leave(*_):
    worker.kill(); worker.wait()
    open(f"{sys.argv[1]}/left-in-order", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
open(f"{sys.argv[1]}/silent.pids", "w").write(f"{os.getpid()} {worker.pid}")
time.sleep(600)
"""
# A rank of the trainer, which does what its argument says.
RANK = """
import json, os, signal, sys, time
folder, *acts = sys.argv[1:]
rank = int(os.environ.get("RANK", 0))
def touch(name): open(f"{folder}/{name}", "w").close()
def wait_for(name):
    while not os.path.exists(f"{folder}/{name}"): time.sleep(0.01)
def is_lost(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
def wait_until_lost(other):
    wait_for(f"rank-{other}.pids")
    while not is_lost(open(f"{folder}/rank-{other}.pids").read()): time.sleep(0.01)
    time.sleep(0.3)  # who notices at once may be heard of first
open(f"{folder}/rank-{rank}.part", "w").write(str(os.getpid()))
os.rename(f"{folder}/rank-{rank}.part", f"{folder}/rank-{rank}.pids")
exec(acts[rank])
"""

# Of a script that is started several times: what it does at each start, and what it writes down of it.
STARTS = """
import json, os, signal, sys, threading, time
def note_start(name, *facts):
    with open(f"{folder}/{name}.starts", "a") as file: file.write(json.dumps([os.getpid(), *facts]) + "\\n")
    return len(open(f"{folder}/{name}.starts").readlines())
def touch(name): open(f"{folder}/{name}", "w").close()
def wait_for(name):
    while not os.path.exists(f"{folder}/{name}"): time.sleep(0.01)
def when(name, act):
    threading.Thread(target=lambda: (wait_for(name), act()), daemon=True).start()
def die(code, words=""):
    print(words, flush=True); os._exit(code)
"""
SERVER_STARTS = (
    STARTS
    + """
role, run_file, folder, _, acts = sys.argv[1:]
keys = [os.environ[f"DISTILLSERVE_{name}_KEY"] for name in ("ROLLOUT", "TEACHER")]
port = json.load(open(run_file))[role]["port"]
number = note_start(f"{role}-{port}", port, keys, os.environ["DISTILLSERVE_LAUNCH"])
exec(json.loads(acts).get(str(number), ""))
"""
    + SERVER
)
TRAINER_STARTS = (
    STARTS
    + """
folder, acts, *more = sys.argv[1:]
acts, rank = json.loads(acts), int(os.environ.get("RANK", 0))
number = note_start(f"trainer-{rank}", more, os.environ.get("MASTER_PORT"), os.environ["DISTILLSERVE_FOLDER_LOCK"])
with open(f"{folder}/trainer.pids", "a") as file: file.write(f"{os.getpid()} ")
touch("out/config.json")
exec(acts.get(str(number), "wait_for('enough')"))
"""
)


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


class Replaced(Roles):
    """Roles, with another script for one of them."""

    def __init__(self, folder: Path, role: str, *script: str, trainer_s: float = 600.0):
        super().__init__(folder, trainer_s=trainer_s)
        self._role, self._script = role, script

    def __call__(self, role: str, run_file: Path) -> list[str]:
        return [sys.executable, "-c", *self._script] if role == self._role else super().__call__(role, run_file)


class Ranks(Roles):
    """Roles with several ranks, each of which does one of `acts`."""

    def __init__(self, folder: Path, *acts: str):
        super().__init__(folder)
        self._acts = acts

    def __call__(self, role: str, run_file: Path) -> list[str]:
        if role == "trainer":
            return [sys.executable, "-c", RANK, self._folder, *self._acts]
        return super().__call__(role, run_file)


class Restarted(Roles):
    """Roles that write down each of their starts, each of which may do something of its own; a trainer ends once there is a
    file "enough".

    Args:
        acts: by role and the number of the start, e.g. {"teacher": {2: "die(9)"}}.
    """

    def __init__(self, folder: Path, acts: dict[str, dict[int, str]] | None = None):
        super().__init__(folder)
        self._acts = acts or {}

    def __call__(self, role: str, run_file: Path) -> list[str]:
        acts = json.dumps(self._acts.get(role, {}))
        if role == "trainer":
            return [sys.executable, "-c", TRAINER_STARTS, self._folder, acts]
        return [sys.executable, "-c", SERVER_STARTS, role, str(run_file), self._folder, "", acts]


def starts(folder: Path, name: str) -> list[list[Any]]:
    """What each start of a role has written down, the process first; of a server the name has its port."""
    path = folder / f"{name}.starts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def living(folder: Path) -> list[int]:
    pids = [int(pid) for file in folder.glob("*.pids") for pid in file.read_text().split()]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in state(pid)]


def wait_until_nobody_lives(folder: Path) -> None:
    """A killed process needs a moment to be gone, a longer one on a busy machine."""
    for _ in until(10.0):
        if not living(folder):
            return


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def start_up(config: RunConfig, roles: str, tmp_path: Path, **options: Any) -> "subprocess.Popen[bytes]":
    """`up` as a process of its own; `roles` is the expression of its command factory, with `folder` in scope."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom services.config import RunConfig\n"
        "from services.launch.supervisor import up\nfrom tests.unit.services.launch.roles import *\n"
        f"config, folder = RunConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2])\nsys.exit(up(config, {roles}))"
    )
    arguments = [sys.executable, "-c", script, config.model_dump_json(), str(tmp_path)]
    return subprocess.Popen(arguments, cwd=Path(__file__).parents[4], start_new_session=True, **options)


def wait_until_training(process: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    for _ in until(30.0):
        assert process.poll() is None, "ended too early"
        if (tmp_path / "trainer.pids").exists():
            return


def until(patience_s: float) -> Iterator[None]:
    """Rounds of a loop that waits for something."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        yield
        time.sleep(0.05)
    raise AssertionError(f"did not happen within {patience_s} s")


def press_ctrl_c_twice(process: "subprocess.Popen[bytes]") -> None:
    """The second time once the student is being saved."""
    os.kill(process.pid, signal.SIGINT)
    assert process.stdout is not None
    for line in process.stdout:
        if b"saving the student first" in line:
            break
    os.kill(process.pid, signal.SIGINT)
