"""What a step costs on this machine, each part against real servers; writes results/step.json.

Machines are shared and noisy: every figure is a median, with the fastest and slowest run beside it.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.clients import TeacherClient
from services.wire.rollout import RolloutSampling
from tests.benchmarks import results
from tests.integration.attach import attached
from tests.integration.processes import KEY, server
from tests.pushing import learner_of
from trainer.tiny.pair import build_tiny_pair

PAIR = Path("outputs/tiny-pair")
NUM_ROLLOUTS, NEW_TOKENS, REPEATS, WARM_UP = 64, 5, 30, 5
TOP_K = 32


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, fastest, slowest, after a warm-up."""
    kept = seconds[WARM_UP:]
    return {"median_s": statistics.median(kept), "min_s": min(kept), "max_s": max(kept)}


async def timed(work: Callable[[], Awaitable[object]]) -> dict[str, float]:
    """Seconds of one call."""
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        started = time.perf_counter()
        await work()
        seconds.append(time.perf_counter() - started)
    return summary(seconds)


async def measure(rollout_url: str, teacher_url: str) -> dict[str, dict[str, float]]:
    """64 rollouts, their scoring, a push of the student, and a push with its canary."""
    prompts = [list(f"{a:02d}+{b:02d}=".encode()) for a in range(8) for b in range(8)]
    sampling = RolloutSampling(max_new_tokens=NEW_TOKENS)
    figures: dict[str, dict[str, float]] = {}
    async with (
        attached(learner_of(str(PAIR / "student")), rollout_url) as (pushing, rollouts),
        TeacherClient([teacher_url], key=KEY) as teacher,
    ):
        pushes = [await pushing.push(version) for version in range(WARM_UP + REPEATS)]
        figures["push_and_canary"] = summary([push["push_s"] + push["canary_s"] for push in pushes])
        figures["push"] = summary([push["push_s"] for push in pushes])
        figures["rollouts_64"] = await timed(lambda: rollouts.generate(prompts[:NUM_ROLLOUTS], sampling))
        completions = await rollouts.generate(prompts[:NUM_ROLLOUTS], sampling)
        sequences = [([*prompts[c.prompt_index], *c.token_ids.tolist()], 6) for c in completions]
        figures["teacher_64"] = await timed(lambda: teacher.score(sequences, top_k=TOP_K))
    return figures


def main() -> None:
    build_tiny_pair(PAIR)
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        student, teacher = str(PAIR / "student"), str(PAIR / "teacher")
        limits = ["--rollout.max_model_len", "64", "--sampling.max_new_tokens", "16"]
        with (
            server("rollout", logs / "rollout", "--student.model", student, *limits) as rollout,
            server("teacher", logs / "teacher", "--teacher.model", teacher) as scorer,
        ):
            figures = asyncio.run(measure(rollout.url, scorer.url))
    results.write("step", {"repeats": REPEATS, "figures": figures})
    table = Table("what", "median", "fastest", "slowest")
    for name, figure in figures.items():
        table.add_row(name, *(f"{figure[key] * 1000:.0f} ms" for key in ("median_s", "min_s", "max_s")))
    Console().print(table)
