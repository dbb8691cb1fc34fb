"""Start a real role of the project, wait until it is ready, end it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from services.config.addresses import url_of
from services.models.vllm_environment import vllm_defaults
from services.process.startup import free_port

PROGRAMS = {"rollout": "services.rollout.process", "teacher": "services.cli\0teacher", "trainer": "services.cli\0train"}
"""What the command line of a role's own process contains."""
KEY = "a-key-for-tests"
READY_TIMEOUT_S = 240.0


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60.0, trust_env=False, **options)

    @property
    def address(self) -> tuple[str, int]:
        """For a raw socket."""
        return "127.0.0.1", httpx.URL(self.url).port or 0

    def memory_mib(self) -> float:
        """Resident memory of the process itself, MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def metric(self, name: str) -> float:
        """A gauge or counter without labels, e.g. "pending_requests"."""
        with self.client() as client:
            return float(client.get("/metrics").text.split(f"\ndistillserve_teacher_{name} ")[1].split()[0])


@dataclass
class Family:
    """A process and all that it has started by now, and the shared memory that they have open under a name."""

    pids: set[int]
    memory: set[Path]

    @classmethod
    def of(cls, pid: int) -> "Family":
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has just ended
                continue
        pids, found = {pid}, {pid}
        while found:
            found = {child for child, parent in parents.items() if parent in found}
            pids |= found
        lines = [line for one in pids for line in Path(f"/proc/{one}/maps").read_text().splitlines()]
        names = {line.split(maxsplit=5)[5] for line in lines if " /dev/shm/" in line}
        return cls(pids, {Path(name) for name in names if not name.endswith("(deleted)")})

    def left(self) -> list[str]:
        """What is still there."""
        running = [f"process {pid}" for pid in sorted(self.pids) if is_running(pid)]
        return running + [str(path) for path in sorted(self.memory) if path.exists()]

    def is_gone(self) -> bool:
        return not self.left()


def pids_of_role(up: int, role: str) -> list[int]:
    """The processes of a role that `distillserve up` has started itself and that run; of the trainer one a rank.

    Args:
        up: its process.
    """
    found = []
    for pid in Path(f"/proc/{up}/task/{up}/children").read_text().split():
        with suppress(OSError):  # it has just ended
            if PROGRAMS[role] in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(int(pid))
    return found


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@dataclass
class Engine:
    """Switches of the engine of a teacher that was started by tests/integration/switched_teacher.py."""

    folder: Path

    def hold(self) -> None:
        """Let forward passes wait from now on."""
        (self.folder / "hold").touch()

    def wait_held(self) -> None:
        """Until a forward pass waits."""
        wait_until((self.folder / "held").exists)

    def release(self) -> None:
        for name in ("hold", "held"):
            (self.folder / name).unlink(missing_ok=True)

    def break_(self) -> None:
        """Let forward passes fail from now on."""
        (self.folder / "broken").touch()


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.01)


def command(*arguments: str, engine: Engine | None = None) -> list[str]:
    if engine is not None:
        return [sys.executable, "-m", "tests.integration.switched_teacher", str(engine.folder), *arguments]
    return [sys.executable, "-m", "services.cli", *arguments]


def environment() -> dict[str, str]:
    """Ours, with keys."""
    return {
        **os.environ,
        "DISTILLSERVE_ROLLOUT_KEY": KEY,
        "DISTILLSERVE_TEACHER_KEY": KEY,
        "OMP_WAIT_POLICY": "PASSIVE",
    }


@contextmanager
def server(
    role: str,
    log: Path,
    *arguments: str,
    engine: Engine | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> Iterator[Server]:
    """`distillserve ROLE` on a free port of its own, ended (with everything it started) at the end.

    Args:
        engine: switches for the engine of a teacher.
        port: of a server that was killed and is started again.
    """
    port = port or free_port(host, 0)
    words = command(role, f"--{role}.host", host, f"--{role}.port", str(port), *arguments, engine=engine)
    with _running(url_of(host, port), log, words, environment(), "/ready") as running:
        yield running


@contextmanager
def plain_vllm(model: str, log: Path, *arguments: str) -> Iterator[Server]:
    """vLLM's own OpenAI server, in float32 and with a key, on a free port of its own."""
    port = free_port("127.0.0.1", 0)
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    words += ["--dtype", "float32", "--api-key", KEY, "--enforce-eager", *arguments]
    url = f"http://127.0.0.1:{port}"
    with _running(url, log, words, {**vllm_defaults("float32"), **os.environ}, "/health") as running:
        yield running


@contextmanager
def _running(url: str, log: Path, words: list[str], environment: dict[str, str], ready_path: str) -> Iterator[Server]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    running = Server(url, process, log)
    try:
        _wait_ready(running, ready_path)
        yield running
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, then SIGKILL, to the whole session of `process`."""
    for number, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait(10.0)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """kill -9 of a server; what it has started is left to end by itself."""
    process.kill()
    process.wait(10.0)


def _wait_ready(running: Server, path: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if running.process.poll() is not None:
            raise RuntimeError(f"exited with {running.process.returncode}:\n{running.log.read_text()[-3000:]}")
        try:
            if httpx.get(f"{running.url}{path}", timeout=5.0, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"not ready after {READY_TIMEOUT_S} s:\n{running.log.read_text()[-3000:]}")
