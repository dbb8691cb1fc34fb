"""A trainer step of two ranks on two cores against one rank on one core; writes results/ranks.json.

A 235 M student (push.py), 8 samples of 32 prompt and 48 new tokens, float32, a thread a rank; step after step in turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from services.config import RunConfig
from tests.benchmarks import results
from tests.benchmarks.push import NEW_TOKENS, NUM_PROMPTS, PROMPT_TOKENS, save_student
from tests.random_batches import random_batch
from tests.ranks import leave
from trainer.learner import Learner
from trainer.parallel import load_and_place
from trainer.ranks.group import join_ranks

LAYOUTS = {"one rank": (1, "fsdp2"), "two ranks, fsdp2": (2, "fsdp2"), "two ranks, ddp": (2, "ddp")}
STEPS, ROUNDS, TOP_K = 3, 2, 32


def steps_of_one_rank(folder: str, parallelism: str, answer: Path) -> None:
    """What each process runs: the seconds of a step, after one that warms up."""
    torch.set_num_threads(1)
    config = RunConfig(student={"model": folder}, trainer={"parallelism": parallelism})
    ranks = join_ranks(config)
    os.sched_setaffinity(0, {ranks.index % (os.cpu_count() or 1)})
    learner = Learner(config, load_and_place(config, ranks), STEPS + 1, ranks)
    batch = random_batch([NEW_TOKENS] * NUM_PROMPTS, PROMPT_TOKENS, TOP_K, learner.student.vocab_size)
    seconds, peak = [], 0.0
    for _ in range(STEPS + 1):
        ranks.of_first(0)  # together
        started = time.perf_counter()
        peak = learner.step(batch)["peak_memory_gib"]
        seconds.append(time.perf_counter() - started)
    if ranks.index == 0:
        answer.write_text(json.dumps({"seconds": seconds[1:], "peak_memory_gib": peak}))
    ranks.of_first(0)


def run_layout(folder: str, num_ranks: int, parallelism: str, answer: Path) -> tuple[list[float], float]:
    """Seconds of each step, and the most memory that a rank held, GiB."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += ["-m", "tests.benchmarks.ranks", folder, parallelism, str(answer)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(answer.read_text())
    return found["seconds"], found["peak_memory_gib"]


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = save_student(Path(place) / "student")
        for _ in range(ROUNDS):
            for name, (num_ranks, parallelism) in LAYOUTS.items():
                of_run, peaks[name] = run_layout(folder, num_ranks, parallelism, Path(place) / "answer.json")
                seconds[name] += of_run
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table(title="a step of a 235 M student, 8 x 48 tokens")
    for column in ("", "s", "of one rank", "GiB a rank"):
        table.add_column(column, justify="right")
    for name, median in medians.items():
        table.add_row(name, f"{median:.2f}", f"{median / medians['one rank']:.2f}x", f"{peaks[name]:.2f}")
    Console().print(table)
    layouts = {
        name: {
            "median_s": medians[name],
            "min_s": min(values),
            "max_s": max(values),
            "of_one_rank": medians[name] / medians["one rank"],
            "peak_memory_gib": peaks[name],
        }
        for name, values in seconds.items()
    }
    results.write("ranks", {"layouts": layouts})


if __name__ == "__main__":
    steps_of_one_rank(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    leave()
