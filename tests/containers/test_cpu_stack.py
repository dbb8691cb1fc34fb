"""The CPU stack from nothing but a clone, in real containers: `make test-containers`, which needs Docker and Compose.

BASE_IMAGE in the environment names another base image, where the default one cannot be pulled.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.process.startup import free_port

CLONE = Path(__file__).parents[2]
BUILD_AND_RUN_S = 2400
pytestmark = [pytest.mark.containers, pytest.mark.timeout(3000)]


class Stack:
    """A new clone and its containers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        name = f"distillserve-test-{os.getpid()}"
        self.environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "COMPOSE_PROJECT_NAME": name}
        self.environment |= {key: os.environ[key] for key in ("BASE_IMAGE", "DOCKER_HOST") if key in os.environ}
        self.environment["TEACHER_BIND"] = f"127.0.0.1:{free_port('127.0.0.1', 0)}"
        has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
        self.compose = ["docker", "compose"] if has_plugin else ["docker-compose"]
        subprocess.run(["git", "clone", "--quiet", str(CLONE), str(folder)], check=True)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=BUILD_AND_RUN_S,
        )

    def in_compose(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        files = ("-f", "compose.yaml", "-f", "deploy/compose.cpu.yaml")
        return self.run(*self.compose, *files, *words, **environment)

    def output(self, *words: str) -> str:
        done = self.in_compose(*words)
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.fail("these tests need a Docker engine that this user may use")
    stack = Stack(tmp_path_factory.mktemp("clone") / "distillserve")
    yield stack
    stack.in_compose("down", "--volumes", "--timeout", "5")


def test_one_command_builds_trains_to_the_bound_and_ends_with_0(stack: Stack) -> None:
    done = stack.run("make", "up", "BACKEND=cpu")
    assert done.returncode == 0, done.stdout[-5000:]
    run = stack.folder / "outputs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["exact_match"] <= 0.3 and summary["after"]["exact_match"] >= 0.9
    assert {path.stat().st_uid for path in run.rglob("*")} == {os.getuid()}


def test_a_trainer_that_is_stopped_has_saved_its_student(stack: Stack) -> None:
    started = stack.in_compose("up", "--detach", OVERWRITE="true")
    assert started.returncode == 0, started.stdout
    key = stack.output("exec", "-T", "teacher", "cat", "/keys/teacher/key").strip()
    metrics = stack.folder / "outputs" / "tiny" / "metrics.jsonl"
    begun, deadline = time.time(), time.monotonic() + 300
    while not (metrics.exists() and metrics.stat().st_mtime > begun and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline, stack.output("logs", "--tail", "50")
        time.sleep(0.2)  # the one sign that a step has ended is its row
    assert stack.in_compose("stop", "trainer").returncode == 0
    assert not (metrics.parent / "summary.json").exists()
    assert (metrics.parent / "student" / "model.safetensors").stat().st_mtime > begun
    assert "Traceback" not in stack.output("logs", "trainer")
    assert key not in stack.output("logs") + stack.output("config")
    assert stack.in_compose("down").returncode == 0
    again = stack.output("run", "--rm", "--no-deps", "--entrypoint", "cat", "trainer", "/keys/teacher/key")
    assert again.split()[-1] == key  # Compose 1.29 says first what it makes
    shutil.rmtree(metrics.parent)
