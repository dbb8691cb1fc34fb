"""Real processes that cannot start, or are asked to end."""

import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from services.process.startup import free_port
from tests.integration.processes import KEY, command, environment, server

pytestmark = pytest.mark.integration


def refused(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments), env={**environment(), **env}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("role", ["rollout", "teacher"])
def test_a_taken_port_ends_a_server_with_one_line(role: str, models: dict[str, str]) -> None:
    model = {"rollout": "--student.model", "teacher": "--teacher.model"}[role]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        done = refused(role, model, models["qwen3"], f"--{role}.port", port)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith(f"distillserve: {role}.port = {port} cannot be used on 127.0.0.1")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["rollout", "--student.model", "./no-such-model", "--rollout.port"], "student.model"),
        (["teacher", "--teacher.model", "./no-such-model", "--teacher.port"], "teacher.model"),
    ],
)
def test_a_missing_model_ends_a_server_with_one_line(arguments: list[str], key: str) -> None:
    done = refused(*arguments, str(free_port("127.0.0.1", 0)))
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith(f"distillserve: {key} = './no-such-model' is no model folder")


def test_a_public_address_without_a_key_is_refused(models: dict[str, str]) -> None:
    done = refused(
        "teacher", "--teacher.model", models["qwen3"], "--teacher.host", "0.0.0.0", DISTILLSERVE_TEACHER_KEY=""
    )
    assert done.returncode == 2 and "DISTILLSERVE_TEACHER_KEY is not set" in done.stderr


@pytest.mark.long
def test_up_ends_the_servers_when_the_trainer_cannot_start(models: dict[str, str], tmp_path: Path) -> None:
    """The trainer finds its data missing; the servers, real ones, are ended and the exit code is the trainer's."""
    done = refused(
        *("up", "--student.model", models["qwen3"], "--teacher.model", models["qwen3"], "--pipeline.steps", "1"),
        *("--data.path", str(tmp_path / "none.jsonl"), "--output.dir", str(tmp_path / "out")),
        *("--rollout.max_model_len", "64", "--sampling.max_new_tokens", "8"),
    )
    assert done.returncode == 2, done.stdout[-2000:]
    assert "cannot read" in done.stdout and "the trainer exited with code 2; ending the others" in done.stdout
    assert KEY not in done.stdout + done.stderr
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
    assert left == ""


def test_sigterm_ends_the_teacher_with_success(models: dict[str, str], tmp_path: Path) -> None:
    with server("teacher", tmp_path / "log", "--teacher.model", models["qwen3"]) as running:
        body = {"sequences": [{"prompt": "2+2=", "completion": "4"}], "top_k": 3}
        with running.client() as client:
            assert client.post("/v1/teacher/logprobs", json=body).status_code == 200
        assert httpx.post(f"{running.url}/v1/teacher/logprobs", json=body, trust_env=False).status_code == 401
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=30) == 0
