"""`distillserve up` with its real roles, one of which is killed: it is started again, and the run is what it would have been."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.endless_run import num_steps
from tests.integration.processes import PROGRAMS, Family, command, environment, pids_of_role, wait_until
from trainer.tiny.pair import build_tiny_pair

pytestmark = [pytest.mark.integration, pytest.mark.long]

STEPS = 240


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tiny") / "pair"
    build_tiny_pair(folder, seed=0)
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(pair: Path, output: Path) -> "Iterator[subprocess.Popen[str]]":
    """The run of `make train`, with a checkpoint every 20 steps; its output is in up.txt."""
    arguments = [
        *("--student.model", f"{pair}/student", "--teacher.model", f"{pair}/teacher", "--output.dir", str(output)),
        *("--data.path", f"{pair}/train.jsonl", "--data.eval_path", f"{pair}/eval.jsonl"),
        *("--output.save_every_steps", "20", "--up.restart_trainer", "1"),
    ]
    with output.with_name("up.txt").open("w") as file:
        process = subprocess.Popen(
            command("up", "deploy/runs/tiny.toml", *arguments), env=environment(), stdout=file, stderr=file, text=True
        )
    yield process
    process.kill()
    process.wait()


def said(output: Path) -> str:
    return output.with_name("up.txt").read_text()


def wait_until_trained(process: "subprocess.Popen[str]", output: Path, steps: int) -> None:
    wait_until(lambda: process.poll() is not None or num_steps(output) >= steps, 600.0)
    assert process.poll() is None, said(output)[-4000:]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("role", PROGRAMS)
def test_a_role_that_is_killed_is_started_again_and_the_run_reaches_its_bound(
    role: str, run: "subprocess.Popen[str]", output: Path
) -> None:
    wait_until_trained(run, output, 50)
    (killed,) = pids_of_role(run.pid, role)
    family = Family.of(killed)
    os.kill(killed, signal.SIGKILL)
    assert run.wait(1200) == 0, said(output)[-4000:]
    lines = said(output).splitlines()
    most = 1 if role == "trainer" else 3
    (again,) = [
        line for line in lines if f"starting again (1 of {most}) in 1 s: the {role} was ended by SIGKILL" in line
    ]
    assert again.startswith(f"{role:<7} | ")
    if role != "trainer":
        assert any(re.match(rf"{role:<7} \| ready again after \d+ s at http", line) for line in lines)
    wait_until(family.is_gone, 20.0)

    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["after"]["exact_match"] >= 0.95, summary
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "num_steps" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(row["canary_residual"] <= 1e-4 and row["staleness"] == 0 for row in steps)
    logs = {file.name for file in (output / "logs").iterdir()}
    assert logs == {"rollout.log", "teacher.log", "trainer.log", f"{role}.2.log"}


@pytest.mark.timeout(900)
def test_ctrl_c_while_a_killed_rollout_server_comes_back_saves_the_student_and_leaves_nothing(
    run: "subprocess.Popen[str]", output: Path
) -> None:
    wait_until_trained(run, output, 3)
    (killed,) = pids_of_role(run.pid, "rollout")
    first = Family.of(killed)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: "starting again (1 of 3)" in said(output) and (output / "logs" / "rollout.2.log").exists())
    everybody = Family.of(run.pid)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(90) == 130, said(output)[-4000:]
    assert "Traceback" not in said(output) and (output / "student" / "model.safetensors").exists()
    wait_until(lambda: first.is_gone() and everybody.is_gone(), 20.0)
