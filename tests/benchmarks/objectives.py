"""What each objective needs to learn the tiny pair: full training runs against real servers; writes results/objectives.json.

For every seed a pair is built, a rollout and a teacher server are started, and one trainer after another attaches to
them, each starting from the same student. Half an hour and more on two cores, so it runs only when it is named.
"""

import json
import math
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks import results
from tests.integration.processes import command, environment, server
from trainer.tiny.pair import build_tiny_pair

RUN_FILE = Path("deploy/runs/tiny.toml")
OUTPUT = Path("outputs/objectives")
SEEDS = (0, 1, 2)
STEPS, EVERY, TARGET_KL = 160, 8, 0.25
_NO_SINGLE_STEP = ["--loss.single_step_decomposition", "false"]
OBJECTIVES: dict[str, list[str]] = {
    "full": ["--loss.single_step_estimator", "full"],
    "hybrid": [],
    "truncated": ["--loss.single_step_estimator", "truncated"],
    "student_topk": ["--loss.support", "student_topk"],
    "both, gamma 1": ["--loss.gamma", "1"],
    "policy gradient, gamma 0": _NO_SINGLE_STEP,
    "policy gradient, gamma 1": [*_NO_SINGLE_STEP, "--loss.gamma", "1"],
}


def train(output: Path, arguments: list[str]) -> dict[int, float]:
    """Held-out reverse KL by step of one run of `distillserve train`."""
    done = subprocess.run(
        command("train", str(RUN_FILE), "--output.dir", str(output), "--output.overwrite", "true", *arguments),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{output.name} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["eval_reverse_kl"] for row in rows if "eval_reverse_kl" in row}


def runs_of_seed(seed: int) -> dict[str, dict[int, float]]:
    """Every objective on one pair."""
    pair = OUTPUT / f"pair-{seed}"
    build_tiny_pair(pair, seed=seed)
    student, teacher = str(pair / "student"), str(pair / "teacher")
    limits = ["--rollout.max_model_len", "64", "--sampling.max_new_tokens", "5"]
    curves = {}
    with (
        tempfile.TemporaryDirectory() as logs,
        server("rollout", Path(logs) / "rollout", "--student.model", student, *limits) as rollout,
        server("teacher", Path(logs) / "teacher", "--teacher.model", teacher) as scorer,
    ):
        shared = [
            *("--seed", str(seed), "--student.model", student),
            *("--rollout_client.urls", json.dumps([rollout.url]), "--teacher_client.urls", json.dumps([scorer.url])),
            *("--data.path", str(pair / "train.jsonl"), "--data.eval_path", str(pair / "eval.jsonl")),
            *("--pipeline.steps", str(STEPS), "--evaluation.every_steps", str(EVERY)),
        ]
        for name, options in OBJECTIVES.items():
            folder = OUTPUT / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}-{seed}"
            curves[name] = train(folder, [*shared, *options])
            print(f"seed {seed}, {name}: {min(curves[name].values()):.4f}", flush=True)
    return curves


def steps_to_target(curve: dict[int, float]) -> float:
    """The first evaluated step at or below TARGET_KL, or infinity."""
    return next((float(step) for step, kl in sorted(curve.items()) if kl <= TARGET_KL), math.inf)


def report(curves: dict[int, dict[str, dict[int, float]]]) -> None:
    """Write results/objectives.json and print the table; curves are held-out reverse KL by seed, objective and step."""
    figures = {}
    table = Table(
        "objective", f"steps to reverse KL {TARGET_KL}", "median", f"reverse KL after {STEPS} steps", "median"
    )
    for name in OBJECTIVES:
        steps = [steps_to_target(curves[seed][name]) for seed in SEEDS]
        final = [curves[seed][name][STEPS] for seed in SEEDS]
        figures[name] = {
            "steps_to_target": [step if math.isfinite(step) else None for step in steps],
            "final_reverse_kl": final,
            "curves": {str(seed): curves[seed][name] for seed in SEEDS},
        }
        shown = [f"{step:.0f}" if math.isfinite(step) else "-" for step in (*steps, statistics.median(steps))]
        kls = [f"{kl:.3f}" for kl in (*final, statistics.median(final))]
        table.add_row(name, ", ".join(shown[:-1]), shown[-1], ", ".join(kls[:-1]), kls[-1])
    setting = {"seeds": SEEDS, "steps": STEPS, "evaluated_every": EVERY, "target_kl": TARGET_KL}
    results.write("objectives", {"setting": setting, "figures": figures})
    Console().print(table)


def main() -> None:
    report({seed: runs_of_seed(seed) for seed in SEEDS})


if __name__ == "__main__":
    main()
