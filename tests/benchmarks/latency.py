"""How long one request takes, alone and among others that arrive at random; writes results/latency.json.

Capacity is what clients get that always have a request waiting. Then requests arrive as a Poisson process at half of it,
whether the ones before are answered or not, so that a queue shows in the latencies.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from services.clients import TeacherClient
from tests.benchmarks import results
from tests.benchmarks.scoring import MODELS, TOP_K, random_sequences
from tests.integration.processes import KEY, server

TOKENS = 128
LOADED_CLIENTS = 16
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """Numbers of requests."""

    alone: int
    at_capacity: int
    poisson: int


LOADS = {"small": Load(200, 4000, 4000), "large": Load(20, 96, 200)}

Ask = Callable[[], Awaitable[float]]
"""Score the next request; its latency, seconds."""


async def at_capacity(ask: Ask, count: int) -> float:
    """Requests per second."""
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            await ask()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(LOADED_CLIENTS)))
    return count / (time.perf_counter() - started)


async def arriving(ask: Ask, count: int, per_s: float) -> list[float]:
    """Latencies of requests that arrive as a Poisson process."""
    gaps, due = random.Random(0), time.perf_counter()
    tasks = []
    for _ in range(count):
        due += gaps.expovariate(per_s)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask()))
    return list(await asyncio.gather(*tasks))


async def measure(url: str, load: Load) -> dict[str, Any]:
    requests = random_sequences(64, shortest=TOKENS, longest=TOKENS)
    turn = iter(range(1 << 30))
    async with TeacherClient([url], key=KEY) as client:

        async def ask() -> float:
            started = time.perf_counter()
            await client.score([requests[next(turn) % len(requests)]], top_k=TOP_K)
            return time.perf_counter() - started

        for _ in range(10):  # warm-up
            await ask()
        alone = [await ask() for _ in range(load.alone)]
        capacity = await at_capacity(ask, load.at_capacity)
        latencies = await arriving(ask, load.poisson, capacity / 2)
    lone = float(np.median(alone))
    percentiles = {f"p{p}": float(np.percentile(latencies, p)) for p in PERCENTILES}
    return {
        "alone_s": {"median": lone, "p99": float(np.percentile(alone, 99))},
        "capacity_per_s": capacity,
        "poisson_per_s": capacity / 2,
        "requests": load.poisson,
        "latency_s": percentiles,
        "latency_to_alone": {name: value / lone for name, value in percentiles.items()},
    }


def main() -> None:
    figures = {}
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as parent:
            folder = model.save(Path(parent) / "model")
            with server("teacher", Path(parent) / "log", "--teacher.model", folder) as teacher:
                figures[name] = asyncio.run(measure(teacher.url, LOADS[name]))
    results.write("latency", {"tokens": TOKENS, "top_k": TOP_K, "models": figures})
    table = Table("model", "alone", "capacity", *(f"p{p} at half of it" for p in PERCENTILES), "p99 to alone")
    for name, of_model in figures.items():
        latencies = [f"{value * 1000:.0f} ms" for value in of_model["latency_s"].values()]
        table.add_row(
            name,
            f"{of_model['alone_s']['median'] * 1000:.0f} ms",
            f"{of_model['capacity_per_s']:.0f}/s",
            *latencies,
            f"{of_model['latency_to_alone']['p99']:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
