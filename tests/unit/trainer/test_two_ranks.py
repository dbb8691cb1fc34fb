"""Rank 0 leads, rank 1 follows: calls, interruptions, failures, and what is left of the student after each."""

import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.config import RunConfig
from tests.models import save_model
from tests.unit.trainer.samples import BATCH
from tests.unit.trainer.two_ranks import CANARY, Leading, break_step, kill_this_process, run_pair
from trainer.learner import Learner
from trainer.student import load_student
from trainer.watchdog import Watchdog


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    folder = save_model(tmp_path / "model", "qwen3")
    return RunConfig(
        student={"model": folder},
        optimizer={"learning_rate": 1e-2},
        pipeline={"tokens_per_micro_batch": 8},
        output={"dir": str(tmp_path / "out")},
    )


def saved(config: RunConfig) -> torch.Tensor:
    """The embedding of the student in output.dir."""
    model = AutoModelForCausalLM.from_pretrained(Path(config.output.dir) / "student", dtype=torch.float32)
    found: torch.Tensor = model.get_input_embeddings().weight.detach()
    return found


def after_steps(config: RunConfig, count: int) -> Learner:
    """A learner that is alone and has made some steps."""
    learner = Learner(config, load_student(config.student), 10)
    for _ in range(count):
        learner.step(BATCH)
    return learner


def embedding(learner: Learner) -> torch.Tensor:
    found: torch.Tensor = learner.student.model.get_input_embeddings().weight.detach()
    return found


def all_calls(leading: Leading, into: Path) -> Any:
    learner = leading.learner
    sent = [leading.push(0)]
    steps = [learner.step(BATCH) for _ in range(2)]
    sent += [leading.push(1), leading.push(2)]
    leading.students.save(learner.state())
    return {
        "loss": [step["loss"] for step in steps],
        "grad_norm": [step["grad_norm"] for step in steps],
        "logprobs": [part.tolist() for part in learner.logprobs(CANARY)],
        "reverse_kl": learner.reverse_kl(BATCH),
        "sent": [float(sum(tensor.float().norm() for tensor in tensors)) for tensors in sent],
    }


def test_every_call_is_that_of_one_learner_alone(config: RunConfig, tmp_path: Path) -> None:
    first, second = run_pair(config, tmp_path, all_calls)
    alone = after_steps(config, 0)
    steps = [alone.step(BATCH) for _ in range(2)]
    found = first["result"]
    assert found["loss"] == pytest.approx([step["loss"] for step in steps], rel=1e-5)
    assert found["grad_norm"] == pytest.approx([step["grad_norm"] for step in steps], rel=1e-5)
    for ours, theirs in zip(found["logprobs"], alone.logprobs(CANARY), strict=True):
        assert ours == pytest.approx(theirs.tolist(), abs=1e-4)
    for pair, expected in zip(found["reverse_kl"], alone.reverse_kl(BATCH), strict=True):
        assert pair == pytest.approx(expected, rel=1e-4)
    assert found["sent"][0] != found["sent"][1] == found["sent"][2]
    torch.testing.assert_close(saved(config), embedding(alone), rtol=0, atol=1e-5)
    assert second == {"result": None}


def interrupted(leading: Leading, into: Path) -> Any:
    """A signal that comes in the middle of a call ends it on both ranks at the same place."""
    leading.push(0)
    leading.learner.step(BATCH)
    leading.push(1)
    with leading.interruption.raising():
        check = leading.interruption
        leading.learner._check = _after(2, lambda: check.handle(signal.SIGTERM, None), leading.learner._check)  # type: ignore[method-assign]
        try:
            leading.learner.step(BATCH)
        finally:
            leading.students.save(leading.learner.state())


def _after(count: int, work: Any, then: Any) -> Any:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            work()
        then()

    return check


def test_an_interruption_is_agreed_upon_and_the_student_is_gathered_afterwards(
    config: RunConfig, tmp_path: Path
) -> None:
    first, second = run_pair(config, tmp_path, interrupted)
    assert first["error"] == "Interrupted: ended by SIGTERM" and second == {"result": None}
    torch.testing.assert_close(saved(config), embedding(after_steps(config, 1)), rtol=0, atol=1e-5)


def second_step_fails(leading: Leading, into: Path) -> Any:
    """Where a rank fails in it; the student is what was pushed."""
    leading.push(0)
    leading.learner.step(BATCH)
    leading.push(1)
    started = time.monotonic()
    try:
        leading.learner.step(BATCH)
    finally:
        leading.students.save(leading.learner.state())
        (into / "took.json").write_text(json.dumps(time.monotonic() - started))


def rank_0_breaks(leading: Leading, into: Path) -> Any:
    break_step(2, ValueError("a bug of rank 0"))
    second_step_fails(leading, into)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nof which")


@pytest.mark.parametrize(
    ("scenario", "prepare", "error_0", "error_1"),
    [
        (
            second_step_fails,
            partial(break_step, 2, OUT_OF_MEMORY),
            "RankLostError: rank 1 on ... failed: no GPU memory is left in the step after 1: CUDA out of memory. Tried to "
            "allocate 2.00 GiB. Lower pipeline.tokens_per_micro_batch = 8",
            "DistillServeError: no GPU memory is left",
        ),
        pytest.param(
            second_step_fails,
            partial(break_step, 2, ValueError("a bug of rank 1")),
            "RankLostError: rank 1 on ... failed: a bug of rank 1",
            "Traceback",
            marks=pytest.mark.long,
        ),
        (rank_0_breaks, None, "Traceback ... ValueError: a bug of rank 0", None),
    ],
    ids=["no_memory", "bug", "bug_of_rank_0"],
)
def test_a_rank_that_fails_ends_both_and_says_why(
    scenario: Any, prepare: Any, error_0: str, error_1: str | None, config: RunConfig, tmp_path: Path
) -> None:
    first, second = run_pair(config, tmp_path, scenario, *([prepare] if prepare else []))
    position = 0
    for part in error_0.split(" ... "):
        position = first["error"].index(part, position)
    if error_1 is None:
        assert second == {"result": None}
    else:
        assert second["error"].startswith(error_1)
    assert json.loads((tmp_path / "took.json").read_text()) < 20.0
    # What was pushed is bfloat16.
    torch.testing.assert_close(saved(config), embedding(after_steps(config, 1)), rtol=0.01, atol=1e-3)


class Killed:
    """Prepares the death of this process in the second step."""

    def __call__(self) -> None:
        step, steps = Learner.step, 0

        def dying(self: Learner, batch: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 2:
                kill_this_process()
            return step(self, batch)

        Learner.step = dying  # type: ignore[method-assign]


def rank_0_dies(leading: Leading, into: Path) -> Any:
    Killed()()
    second_step_fails(leading, into)


def test_a_rank_that_is_killed_is_named(config: RunConfig, tmp_path: Path) -> None:
    first, second = run_pair(config, tmp_path, second_step_fails, Killed())
    assert first["error"].startswith("RankLostError: rank 1 on ") and "was killed" in first["error"] and second == {}
    assert json.loads((tmp_path / "took.json").read_text()) < 20.0
    torch.testing.assert_close(saved(config), embedding(after_steps(config, 1)), rtol=0.01, atol=1e-3)


def test_when_rank_0_is_killed_another_one_saves(config: RunConfig, tmp_path: Path) -> None:
    first, second = run_pair(config, tmp_path, rank_0_dies)
    assert first == {} and second["error"] == "RankLostError: rank 0 was killed, or lost its connection"
    torch.testing.assert_close(saved(config), embedding(after_steps(config, 1)), rtol=0.01, atol=1e-3)


def tell_own_process(into: Path) -> None:
    (into / "pid").write_text(str(os.getpid()))


def second_rank_is_stopped(leading: Leading, into: Path) -> Any:
    """Rank 1 does nothing any more, but its process and its connection live."""
    leading.push(0)
    leading.learner.step(BATCH)
    leading.push(1)
    stopped = int((into / "pid").read_text())
    os.kill(stopped, signal.SIGSTOP)
    subprocess.Popen(["sh", "-c", f"sleep 40; kill -9 {stopped}"])  # for the end of this test
    with Watchdog(dead_s=12.0):
        leading.learner.step(BATCH)


@pytest.mark.long
def test_a_rank_that_is_stopped_is_noticed_and_the_student_is_that_of_the_last_push(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = run_pair(config, tmp_path, second_rank_is_stopped, partial(tell_own_process, tmp_path))
    assert first == second == {}  # neither ended by itself: rank 0 left a collective that has no end
    said = capfd.readouterr().err.splitlines()
    line = next(line for line in said if line.startswith("distillserve: rank 1 on "))
    assert "has shown no sign of life for 1" in line and line.endswith("s (trainer.watchdog_s)")
    expected = embedding(after_steps(config, 1)).bfloat16().float()
    torch.testing.assert_close(saved(config), expected, rtol=0, atol=1e-2)
