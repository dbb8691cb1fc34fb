"""What checkpoints every 20 steps cost a run, and how long going on takes; writes results/checkpoint.json.

A 235 M student (push.py), 8 samples of 32 prompt and 48 new tokens, float32. 20 steps without a checkpoint against 20 steps while
the one before them is written, in turns: the steps are the learner's alone, so that a real run, which also waits for servers,
loses a smaller part.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.config import RunConfig
from services.config.output_dir import complete_checkpoints
from tests.benchmarks import results
from tests.benchmarks.push import NEW_TOKENS, NUM_PROMPTS, PROMPT_TOKENS, save_student
from tests.random_batches import random_batch
from trainer.checkpoint.folder import open_checkpoint
from trainer.learner import Learner
from trainer.output.checkpoints import Checkpoints
from trainer.output.saving import SavedStudents
from trainer.parallel import load_student_of
from trainer.ranks.group import Ranks
from trainer.tiny.pair import build_tokenizer

STEPS, ROUNDS, TOP_K = 20, 3, 32


def median(seconds: list[float]) -> dict[str, float]:
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def steps(learner: Learner, checkpoints: Checkpoints | None) -> tuple[float, float]:
    """Seconds of 20 steps, with a checkpoint before them, and of its copy."""
    batch = random_batch([NEW_TOKENS] * NUM_PROMPTS, PROMPT_TOKENS, TOP_K, learner.student.vocab_size)
    started, copied = time.perf_counter(), 0.0
    if checkpoints is not None:
        checkpoints.make(learner.finished_step, {"config": {}})
        copied = time.perf_counter() - started
    for _ in range(STEPS):
        learner.step(batch)
    if checkpoints is not None:
        checkpoints.wait()
    return time.perf_counter() - started, copied


def measure(place: Path) -> dict[str, dict[str, float]]:
    config = RunConfig(student={"model": save_student(place / "student")}, output={"dir": str(place / "out")})
    learner = Learner(config, load_student_of(config, Ranks(), None), 10_000)
    checkpoints = Checkpoints(
        config.output, learner, SavedStudents(config.output, learner.student.model, build_tokenizer()), lambda: None
    )
    steps(learner, None)  # warms up
    alone, beside, copies, writes, sizes = [], [], [], [], []
    for _ in range(ROUNDS):
        alone.append(steps(learner, None)[0])
        seconds, copied = steps(learner, checkpoints)
        beside.append(seconds)
        copies.append(copied)
        shutil.rmtree(place / "out")
        checkpoints = Checkpoints(
            config.output, learner, SavedStudents(config.output, learner.student.model, build_tokenizer()), lambda: None
        )
        started = time.perf_counter()
        checkpoints.make(learner.finished_step, {"config": {}})
        checkpoints.wait()
        writes.append(time.perf_counter() - started)
        (path,) = complete_checkpoints(place / "out").values()
        sizes.append(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**30)
    started = time.perf_counter()
    checkpoint = open_checkpoint(path)
    checked = time.perf_counter() - started
    other = Learner(config, load_student_of(config, Ranks(), path), 10_000)
    other.resume(checkpoint)
    loaded = time.perf_counter() - started
    return {
        "20_steps": median(alone),
        "20_steps_and_a_checkpoint": median(beside),
        "copy": median(copies),
        "alone_from_copy_to_complete": median(writes),
        "going_on": {"checksums_s": checked, "all_s": loaded},
        "size": {"gib": sizes[-1]},
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder))
    without, beside = figures["20_steps"]["median_s"], figures["20_steps_and_a_checkpoint"]["median_s"]
    results.write("checkpoint", {"steps": STEPS, "rounds": ROUNDS, "share": beside / without - 1, "figures": figures})
    table = Table(
        "what", "median s", "fastest", "slowest", title=f"235 M student, a checkpoint costs {beside / without - 1:.1%}"
    )
    for name, figure in figures.items():
        if "median_s" in figure:
            table.add_row(name, *(f"{figure[key]:.2f}" for key in ("median_s", "min_s", "max_s")))
    Console().print(table)
    Console().print(figures["going_on"], figures["size"])
