"""The programs of docs/from-trl.md and docs/python-api.md as they are written, against real servers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.processes import Family
from trainer.tiny.pair import build_tiny_pair

pytestmark = [pytest.mark.integration, pytest.mark.long]

ROOT = Path(__file__).parents[2]


def programs(page: str) -> list[str]:
    """The blocks of a page that make a run."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return [block for block in blocks if ".train()" in block]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs run: with the tiny pair."""
    folder = tmp_path_factory.mktemp("programs")
    build_tiny_pair(folder / "outputs" / "tiny-pair")
    return folder


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(program: str, folder: Path, *launcher: str) -> "subprocess.Popen[str]":
    """As a script without `if __name__ == "__main__":`."""
    path = folder / "program.py"
    path.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(path)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(program: str, folder: Path, *launcher: str) -> str:
    process = start(program, folder, *launcher)
    said, errors = process.communicate(timeout=500)
    assert process.returncode == 0, said[-4000:] + errors[-4000:]
    return said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("index", range(3))
def test_a_program_of_ten_lines_does_what_a_snippet_of_the_page_did(index: int, folder: Path) -> None:
    program = programs("from-trl.md")[index]
    assert len([line for line in program.splitlines() if line]) <= 10
    said = run(program, folder)
    (name,) = re.findall(r"\"dir\": \"outputs/([\w-]+)\"", program)
    out = folder / "outputs" / name
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 10
    if "eval_dataset" in program:
        assert summary["before"]["reverse_kl"] > 0 and summary["after"]["num_kl_tokens"] > 0
    before, after = weights(folder / "outputs" / "tiny-pair" / "student"), weights(out / "student")
    assert any(not torch.equal(before[key], after[key]) for key in before)
    lines = said.splitlines()
    assert any(line.startswith("rollout | ready at http://127.0.0.1:") for line in lines)
    assert any(line.startswith("teacher | ready at http://127.0.0.1:") for line in lines)
    assert any(line.startswith("trainer | ") and "step" in line for line in lines)


@pytest.mark.timeout(600)
def test_the_program_of_the_python_page_saves_a_copy(folder: Path) -> None:
    (program,) = programs("python-api.md")
    run(program, folder)
    copy, student = folder / "outputs" / "python" / "copy", folder / "outputs" / "python" / "student"
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in student.iterdir())


ON_RANKS = """
import torch
from trainer import DistillationTrainer, RunConfig

config = RunConfig(sampling={"max_new_tokens": 5}, pipeline={"steps": 3}, output={"dir": "outputs/ranks"})
pair, optimizers = "outputs/tiny-pair", ((torch.optim.SGD, {"lr": 0.1}), None)
given = {"student": pair + "/student", "teacher": pair + "/teacher", "train_dataset": pair + "/train.jsonl"}
trainer = DistillationTrainer(config, optimizers=optimizers, **given)
summary = trainer.train()
trainer.save_model("outputs/ranks/copy")
print("summary of a rank:", None if summary is None else summary.steps)
"""


@pytest.mark.timeout(600)
def test_torchrun_of_a_program_starts_the_servers_once_and_trains_on_both_ranks(folder: Path) -> None:
    said = run(ON_RANKS, folder, *TORCHRUN)
    assert sorted(re.findall(r"summary of a rank: (\w+)", said)) == ["3", "None"]
    assert said.count("rollout | ready at") == 1
    assert (folder / "outputs" / "ranks" / "copy" / "model.safetensors").exists()


ENDLESS = """
from trainer import DistillationTrainer, RunConfig

config = RunConfig(sampling={{"max_new_tokens": 5}}, pipeline={{"steps": 100000}}, output={{"dir": "outputs/{name}"}})
pair = "outputs/tiny-pair"
DistillationTrainer(config, student=pair + "/student", teacher=pair + "/teacher", train_dataset=pair + "/train.jsonl").train()
"""


@pytest.fixture
def training(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple["subprocess.Popen[str]", Family, Path]]:
    """A program that trains, and everything that it has started."""
    name = request.node.name.replace("[", "-").rstrip("]")
    process, out = start(ENDLESS.format(name=name), folder), folder / "outputs" / name
    try:
        deadline = time.monotonic() + 300
        while not (out / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.2)
        yield process, Family.of(process.pid), out
    finally:
        process.kill()


def wait_until_gone(family: Family) -> None:
    deadline = time.monotonic() + 40
    while not family.is_gone():
        assert time.monotonic() < deadline, family.left()
        time.sleep(0.2)


@pytest.mark.timeout(600)
def test_ctrl_c_saves_the_student_and_leaves_nothing(training: tuple["subprocess.Popen[str]", Family, Path]) -> None:
    process, family, out = training
    assert len(family.pids) >= 4
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "ended by SIGINT" in errors.splitlines()[-1]
    assert (out / "student" / "model.safetensors").exists() and not (out / "summary.json").exists()
    wait_until_gone(family)


@pytest.mark.timeout(600)
def test_a_program_that_is_killed_leaves_nothing(training: tuple["subprocess.Popen[str]", Family, Path]) -> None:
    process, family, _ = training
    assert len(family.pids) >= 4
    process.kill()
    process.communicate(timeout=60)
    wait_until_gone(family)


@pytest.mark.timeout(600)
def test_a_server_that_dies_ends_the_program_with_its_name_and_the_student_saved(
    training: tuple["subprocess.Popen[str]", Family, Path],
) -> None:
    process, family, out = training
    (teacher,) = (pid for pid in family.pids if b"services.cli\0teacher" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(teacher, signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1 and "the teacher was ended by SIGKILL" in errors.splitlines()[-1]
    assert (out / "student" / "model.safetensors").exists()
    wait_until_gone(family)
