"""Whole runs with reward functions in their own processes: what is written down, and how each failure ends a run."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from services.errors import RewardError
from tests.scripted_teacher import ScriptedTeacher
from tests.unit.trainer.runs import opener, run_config
from trainer import train as training
from trainer.output.progress import describe_steps
from trainer.train import train

FUNCTIONS = """
import os, time

def digits(completions, trainer_state, **kwargs):
    assert trainer_state.num_steps == 3
    return [len(one) + 10.0 * trainer_state.step for one in completions]

def sometimes(completions, prompts, **kwargs):
    return [1.0 if prompt.startswith("1") else None for prompt in prompts]

def late(fault):
    def reward(completions, trainer_state, **kwargs):
        if trainer_state.step < 2:
            return [1.0] * len(completions)
        return fault(completions)
    return reward

def _raise(completions):
    raise ValueError("no")

raises = late(_raise)
hangs = late(lambda completions: time.sleep(600))
nan = late(lambda completions: [float("nan")] * len(completions))
wrong_length = late(lambda completions: [])
dies = late(lambda completions: os._exit(7))
"""
FAULTS = {
    "raises": r"raised ValueError: no \(faulty.py, line \d+\) for the 1 completions of row \d+",
    "hangs": r"has not answered within reward.timeout_s = 1.5 s for the 1 completions of row \d+",
    "nan": r"gave nan \(float\) to sample 0 of row \d+",
    "wrong_length": r"returned 0 rewards for the 1 completions of row \d+",
    "dies": r"its process ended with exit code 7 when it was called for the 1 completions of row \d+",
}


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    with ScriptedTeacher().serving() as serving:
        yield serving


@pytest.fixture
def run(
    tiny_model_folder: Any, tmp_path: Path, teacher: ScriptedTeacher, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    def run(*functions: str, **reward: Any) -> Path:
        (tmp_path / "faulty.py").write_text(FUNCTIONS)
        names = [f"{tmp_path / 'faulty.py'}:{name}" for name in functions]
        reward = {"functions": names, "advantage": "raw", "num_workers": 1, **reward}
        output = {"samples_every_steps": 1, "samples_per_record": 4}
        config = run_config(tiny_model_folder("qwen3"), tmp_path / "out", reward=reward, output=output)
        monkeypatch.setattr(training, "open_session", opener(teacher, lambda session: None))
        train(config)
        return tmp_path / "out"

    return run


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def children() -> set[int]:
    """Processes that this one has started and that still run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(stat.parent.name))
    return found


def test_metrics_and_samples_hold_the_rewards(run: Callable[..., Path]) -> None:
    before = children()
    output = run("digits", "sometimes", weights=[1.0, 0.5])
    assert children() == before
    steps = [row for row in rows(output / "metrics.jsonl") if "num_steps" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    samples = rows(output / "samples.jsonl")
    for row in steps:
        of_step = [sample for sample in samples if sample["step"] == row["step"]]
        assert len(of_step) == 4 and all(set(sample["rewards"]) == {"digits", "sometimes"} for sample in of_step)
        for sample in of_step:
            assert sample["rewards"]["digits"] == len(sample["completion"]) + 10.0 * row["step"]
            assert sample["rewards"]["sometimes"] == (1.0 if sample["row"] == 1 else None)
        digits = [sample["rewards"]["digits"] for sample in of_step]
        assert row["rewards/digits_mean"] == pytest.approx(sum(digits) / 4)
        bonus = 0.5 * sum(sample["row"] == 1 for sample in of_step)
        assert row["reward_mean"] == pytest.approx((sum(digits) + bonus) / 4)
        assert ("rewards/sometimes_mean" in row) == (bonus > 0) and row["reward_s"] > 0
        assert row["advantage_mean"] != 0
    assert f"reward {steps[0]['reward_mean']:.4f}" in describe_steps(steps[:1])


@pytest.mark.parametrize(("fault", "message"), FAULTS.items())
def test_a_reward_that_fails_ends_the_run_in_one_line_with_the_student_saved(
    fault: str, message: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    before = children()
    with pytest.raises(RewardError, match=rf"^reward.functions: .*faulty.py:{fault}:? {message}") as raised:
        run(fault, timeout_s=1.5)
    assert "\n" not in str(raised.value) and children() == before
    steps = [row["step"] for row in rows(tmp_path / "out" / "metrics.jsonl") if "num_steps" in row]
    assert steps == [1] and AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student").num_parameters() > 0
