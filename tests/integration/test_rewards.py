"""Rewards through real processes: what runs with and without them learn, and how one that fails ends a run."""

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.integration.endless_run import arguments, num_steps, started, wait_until_trained
from tests.integration.processes import Family, Server, command, environment, wait_until
from trainer.tiny.pair import build_tiny_pair

pytestmark = [pytest.mark.integration, pytest.mark.long]

HERE = "tests.integration.rewards"
TEACHERLESS = ["--loss.rkl_advantage", "false", "--loss.single_step_decomposition", "false"]
KINDS = {"rewards alone": TEACHERLESS, "teacher alone": ["--loss.alpha_reward", "0"], "both": []}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    build_tiny_pair(folder)
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def learned(pair: Path, output: Path, kind: str, seed: int) -> tuple[list[float], dict[str, float]]:
    """The mean share of sevens of each step, and the held-out reverse KL before and after."""
    words = [
        *("--student.model", str(pair / "student"), "--teacher.model", str(pair / "teacher")),
        *("--data.path", str(pair / "train.jsonl"), "--data.eval_path", str(pair / "eval.jsonl")),
        *("--rollout.max_model_len", "64", "--sampling.max_new_tokens", "5", "--pipeline.steps", "80"),
        *("--pipeline.prompts_per_step", "32", "--pipeline.samples_per_prompt", "4"),
        *("--optimizer.learning_rate", "5e-4", "--optimizer.warmup_steps", "5", "--optimizer.schedule", "cosine"),
        *("--optimizer.beta2", "0.98", "--output.samples_every_steps", "40"),
        *("--reward.functions", json.dumps([f"{HERE}:sevens"]), "--evaluation.num_prompts", "128"),
        *("--seed", str(seed), "--output.dir", str(output), *KINDS[kind]),
    ]
    run = subprocess.run(command("up", *words), env=environment(), capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    metrics = rows(output / "metrics.jsonl")
    summary = json.loads((output / "summary.json").read_text())
    kl = {side: summary[side]["reverse_kl"] for side in ("before", "after")}
    return [row["rewards/sevens_mean"] for row in metrics if "num_steps" in row], kl


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_kind_of_run_moves_the_metric_that_it_learns(seed: int, pair: Path, tmp_path: Path) -> None:
    sevens, kl = {}, {}
    for kind in KINDS:
        of_steps, kl[kind] = learned(pair, tmp_path / kind.replace(" ", "-"), kind, seed)
        sevens[kind] = sum(of_steps[-10:]) / 10
        assert of_steps[0] < 0.2
    # Rewards alone: paid for sevens, it writes nothing else, wherever the teacher is.
    assert sevens["rewards alone"] > 0.9 and kl["rewards alone"]["after"] > kl["rewards alone"]["before"]
    # The teacher alone: nearer to it, and no more sevens.
    assert kl["teacher alone"]["after"] < kl["teacher alone"]["before"] - 0.05 and sevens["teacher alone"] < 0.2
    # Both: between the two.
    assert sevens["teacher alone"] + 0.02 < sevens["both"] < sevens["rewards alone"]
    assert kl["both"]["after"] < kl["rewards alone"]["after"] - 0.5
    samples = rows(tmp_path / "both" / "samples.jsonl")
    assert all(
        sample["rewards"]["sevens"] == sample["completion"].count("7") / max(1, len(sample["completion"]))
        for sample in samples
    )


FAULTS = {
    "raises": r"raised RuntimeError: the judge is out of office \(rewards.py, line \d+\) for the 2 completions of row \d+",
    "hangs": r"has not answered within reward.timeout_s = 2 s for the 2 completions of row \d+; make it faster, or raise .*",
    "nan": r"gave nan \(float\) to sample [01] of row \d+; a reward is a finite number of at most 1e30, or None .*",
    "wrong_length": r"returned 3 rewards for the 2 completions of row \d+",
}


def rewarded_run(models: dict[str, str], rollouts: Server, teacher: Server, output: Path, function: str) -> list[str]:
    functions = json.dumps([f"{HERE}:{function}"])
    options = ["--reward.functions", functions, "--reward.timeout_s", "2", "--pipeline.samples_per_prompt", "2"]
    return command("train", *arguments(models, rollouts, teacher, output), *options)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("function", "message"), FAULTS.items())
def test_a_reward_that_fails_ends_the_run_in_one_line_with_the_student_saved(
    function: str,
    message: str,
    rollout_server: Server,
    teacher_server: Server,
    models: dict[str, str],
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    process = started(rewarded_run(models, rollout_server, teacher_server, output, function))
    wait_until_trained(process, output, 1)
    family = Family.of(process.pid)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 9 and "Traceback" not in said, said
    assert re.fullmatch(rf"distillserve: reward.functions: {HERE}:{function} {message}", said.splitlines()[-1]), said
    assert "the student of step 2 is saved in" in said and num_steps(output) == 2
    assert AutoModelForCausalLM.from_pretrained(output / "student").num_parameters() > 0
    wait_until(family.is_gone, 30.0)


@pytest.mark.timeout(300)
def test_an_interrupted_run_leaves_no_process_of_its_rewards(
    rollout_server: Server, teacher_server: Server, models: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = started(rewarded_run(models, rollout_server, teacher_server, output, "waits"))
    wait_until_trained(process, output, 2)
    family = Family.of(process.pid)
    assert len(family.pids) >= 2
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert [row["reward_mean"] for row in rows(output / "metrics.jsonl") if row.get("step") == 2][0] == 2.0
    wait_until(family.is_gone, 30.0)


@pytest.mark.timeout(300)
def test_a_killed_run_takes_its_reward_processes_along(
    rollout_server: Server, teacher_server: Server, models: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = started(rewarded_run(models, rollout_server, teacher_server, output, "waits"))
    wait_until_trained(process, output, 1)
    family = Family.of(process.pid)
    assert len(family.pids) >= 2
    process.kill()
    process.communicate(timeout=60)
    wait_until(family.is_gone, 30.0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "tests.integration.rewards:seven",
            r"reward.functions\[0\] = 'tests.integration.rewards:seven' cannot be loaded: .*",
        ),
        ("no-such-folder/reward-model", ".*"),
    ],
)
def test_a_name_that_is_wrong_is_said_before_a_server_is_asked(
    function: str, message: str, models: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1+1="}\n')
    words = [
        *("--student.model", models["qwen3"], "--data.path", str(data), "--pipeline.steps", "1"),
        *("--pipeline.samples_per_prompt", "2", "--reward.functions", json.dumps([function])),
        *("--output.dir", str(tmp_path / "out")),
    ]
    run = subprocess.run(
        command("train", *words),
        env=environment() | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    assert re.fullmatch(f"distillserve: {message}", run.stderr.splitlines()[-1]), run.stderr
