"""How long one request takes, alone and among others that arrive at random; writes results/latency.json.

Capacity is what clients get that always have a request waiting. Then requests arrive as a Poisson process at half of it,
whether the ones before are answered or not, so that a queue shows in the latencies. Alone is a request that finds an idle
server: one at a time, after pauses as long as those between the arrivals. The requests are bytes that were made before,
and their answers are only received, so that the cores are left to the server. All of it is done several times, since a
shared machine's speed changes within minutes: a latency is set against the lone latency of its own round.
"""

import asyncio
import gc
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from services.wire.document import SAFETENSORS_MEDIA_TYPE
from tests.benchmarks import results
from tests.benchmarks.scoring import MODELS, TOP_K, Sequence, random_sequences
from tests.integration.processes import Server, server
from tests.integration.raw_http import SCORE, head

TOKENS = 128
LOADED_CLIENTS = 16
PERCENTILES = (50, 90, 99)
ROUNDS = 5


@dataclass(frozen=True)
class Load:
    """Numbers of requests of a round."""

    alone: int
    at_capacity: int
    poisson: int


LOADS = {"small": Load(200, 2000, 2000), "large": Load(20, 48, 100)}

Ask = Callable[[], Coroutine[Any, Any, float]]
"""Score the next request; its latency, seconds."""


class Connections:
    """Sends requests over connections that are kept open, as many as are needed at the same time."""

    def __init__(self, server_: Server, requests: list[Sequence]) -> None:
        self._address = server_.address
        self._messages = itertools.cycle(map(message, requests))
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self) -> float:
        """Seconds from the first byte of the next request to the last one of its answer."""
        started = time.perf_counter()
        while self._idle and self._idle[-1][0].at_eof():  # closed by the server when it was idle
            self._idle.pop()[1].close()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        writer.write(next(self._messages))
        status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
        assert status.split()[1] == "200", status
        length = next(line for line in headers if line.startswith("content-length:"))
        await reader.readexactly(int(length.split(":")[1]))
        self._idle.append((reader, writer))
        return time.perf_counter() - started


def message(sequence: Sequence) -> bytes:
    ids, prompt_length = sequence
    body = {"sequences": [{"token_ids": ids, "prompt_length": prompt_length}], "top_k": TOP_K}
    encoded = json.dumps(body).encode()
    headers = {"accept": SAFETENSORS_MEDIA_TYPE, "content_type": "application/json", "content_length": len(encoded)}
    return head(SCORE, **headers) + encoded


async def one_at_a_time(ask: Ask, count: int, pause_s: float) -> list[float]:
    """Latencies of requests that find nobody before them, after random pauses of this mean."""
    pauses, latencies = random.Random(1), []
    for _ in range(count):
        await asyncio.sleep(pauses.expovariate(1 / pause_s))
        latencies.append(await ask())
    return latencies


async def at_capacity(ask: Ask, count: int) -> float:
    """Requests per second."""
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            await ask()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(LOADED_CLIENTS)))
    return count / (time.perf_counter() - started)


async def arriving(ask: Ask, count: int, per_s: float, seed: int) -> list[float]:
    """Latencies of requests that arrive as a Poisson process."""
    gaps, due = random.Random(seed), time.perf_counter()
    tasks = []
    for _ in range(count):
        due += gaps.expovariate(per_s)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask()))
    return list(await asyncio.gather(*tasks))


@dataclass(frozen=True)
class Round:
    """Latencies, seconds, and requests per second."""

    back_to_back: list[float]
    alone: list[float]
    capacity: float
    arrived: list[float]

    @property
    def to_alone(self) -> np.ndarray:
        """Latencies of those that arrived at random, in lone latencies."""
        return np.array(self.arrived) / np.median(self.alone)


async def measure(server_: Server, load: Load) -> list[Round]:
    ask = Connections(server_, random_sequences(64, shortest=TOKENS, longest=TOKENS)).ask
    for _ in range(10):  # warm-up
        await ask()
    rounds = []
    for index in range(ROUNDS):
        back_to_back = [await ask() for _ in range(load.alone)]
        capacity = await at_capacity(ask, load.at_capacity)
        alone = await one_at_a_time(ask, load.alone, 2 / capacity)
        rounds.append(Round(back_to_back, alone, capacity, await arriving(ask, load.poisson, capacity / 2, seed=index)))
    return rounds


def figures_of(rounds: list[Round]) -> dict[str, Any]:
    """Of all rounds together; the 99th percentiles of each by itself show the noise."""

    def percentiles(name: str) -> dict[str, float]:
        values = np.concatenate([getattr(r, name) for r in rounds])
        return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}

    capacity = float(np.median([r.capacity for r in rounds]))
    return {
        "alone_s": percentiles("alone"),
        "back_to_back_s": percentiles("back_to_back"),
        "capacity_per_s": capacity,
        "poisson_per_s": capacity / 2,
        "requests": sum(len(r.arrived) for r in rounds),
        "latency_s": percentiles("arrived"),
        "latency_to_alone": percentiles("to_alone"),
        "p99_to_alone_of_rounds": [float(np.percentile(r.to_alone, 99)) for r in rounds],
    }


def main() -> None:
    gc.freeze()  # a pause of this process's would be counted as the server's
    figures = {}
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as parent:
            folder = model.save(Path(parent) / "model")
            with server("teacher", Path(parent) / "log", "--teacher.model", folder) as teacher:
                figures[name] = figures_of(asyncio.run(measure(teacher, LOADS[name])))
    results.write("latency", {"tokens": TOKENS, "top_k": TOP_K, "rounds": ROUNDS, "models": figures})
    table = Table("model", "alone", "capacity", *(f"p{p} at half of it" for p in PERCENTILES), "p99 to alone")
    for name, of_model in figures.items():
        latencies = [f"{value * 1000:.0f} ms" for value in of_model["latency_s"].values()]
        table.add_row(
            name,
            f"{of_model['alone_s']['p50'] * 1000:.0f} ms",
            f"{of_model['capacity_per_s']:.0f}/s",
            *latencies,
            f"{of_model['latency_to_alone']['p99']:.1f}",
        )
    Console().print(table)
    gc.unfreeze()  # or libraries complain at the exit of what was not collected


if __name__ == "__main__":
    main()
