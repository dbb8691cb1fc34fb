"""Start a real role of the project, wait until it is ready, end it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from services.startup import free_port

KEY = "a-key-for-tests"
READY_TIMEOUT_S = 240.0


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60.0, **options)


def command(*arguments: str) -> list[str]:
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
def server(role: str, log: Path, *arguments: str) -> Iterator[Server]:
    """`distillserve ROLE` on a free port of its own, ended (with everything it started) at the end."""
    port = free_port("127.0.0.1", 0)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(role, f"--{role}.port", str(port), *arguments),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
    running = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_ready(running)
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


def _wait_ready(running: Server) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if running.process.poll() is not None:
            raise RuntimeError(f"exited with {running.process.returncode}:\n{running.log.read_text()[-3000:]}")
        try:
            if httpx.get(f"{running.url}/ready", timeout=5.0).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"not ready after {READY_TIMEOUT_S} s:\n{running.log.read_text()[-3000:]}")
