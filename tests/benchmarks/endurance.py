"""A teacher that is asked for long, and by many at once; writes results/endurance.json.

Soak: 50,000 requests one after the other from a few clients; the server's memory must not grow. Flood: 200 clients ask
for a minute, more than the server queues; what it accepts it answers, right, and the others are told to come back.
"""

import asyncio
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import Progress

from services.config import TeacherConfig
from services.teacher.jobs import EncodedSequence
from services.teacher.transformers.engine import TransformersEngine
from services.wire.document import SAFETENSORS_MEDIA_TYPE
from services.wire.teacher import TeacherScores, decode_scores
from tests.benchmarks import results
from tests.benchmarks.scoring import HEADERS, MODELS, TOP_K, Sequence, random_sequences
from tests.integration.processes import Server, server
from tests.scoring import score_alone

SOAK_REQUESTS, SOAK_CLIENTS, SAMPLES = 50_000, 8, 50
FLOOD_CLIENTS, FLOOD_S = 200, 60.0
SHORTEST, LONGEST = 16, 128
# Between an answer of the server, in company, and a forward pass over the sequence alone, nats.
TOLERANCE = 1e-5


class Asker:
    """Sends one of a few sequences at a time, and compares each answer with a forward pass of its own.

    Args:
        folder: the server's model.
    """

    def __init__(self, client: httpx.AsyncClient, folder: str) -> None:
        self._client = client
        self._sequences = random_sequences(64, shortest=SHORTEST, longest=LONGEST)
        engine = TransformersEngine(TeacherConfig(model=folder, device="cpu"))
        self._expected = [_alone(engine, sequence) for sequence in self._sequences]
        self._sent = 0
        self.statuses: Counter[int] = Counter()
        self.wrong, self.lost, self.largest_error = 0, 0, 0.0

    async def ask(self) -> httpx.Response | None:
        """The answer, or None when there was none."""
        index = self._sent % len(self._sequences)
        self._sent += 1
        ids, prompt_length = self._sequences[index]
        body = {"sequences": [{"token_ids": ids, "prompt_length": prompt_length}], "top_k": TOP_K}
        try:
            answer = await self._client.post("/v1/teacher/logprobs", json=body)
        except httpx.TransportError:
            self.lost += 1
            return None
        self.statuses[answer.status_code] += 1
        if answer.is_success:
            self._check(decode_scores(answer.content), self._expected[index])
        return answer

    def _check(self, got: TeacherScores, expected: TeacherScores) -> None:
        errors = [
            np.abs(got.columns()[name] - values).max(initial=0.0)
            for name, values in expected.columns().items()
            if name.endswith("logprobs")
        ]
        self.largest_error = max(self.largest_error, *map(float, errors))
        self.wrong += not max(errors) <= TOLERANCE or not np.array_equal(got.token_ids, expected.token_ids)


def _alone(engine: TransformersEngine, sequence: Sequence) -> TeacherScores:
    return score_alone(engine, [EncodedSequence(*sequence)], top_k=TOP_K, temperature=1.0)


async def soak(asker: Asker, teacher: Server) -> dict[str, Any]:
    left, memory = iter(range(SOAK_REQUESTS)), []
    started = time.perf_counter()
    with Progress() as progress:
        task = progress.add_task("soak", total=SOAK_REQUESTS)

        async def client() -> None:
            for number in left:
                if number % (SOAK_REQUESTS // SAMPLES) == 0:
                    memory.append(teacher.memory_mib())
                await asker.ask()
                progress.advance(task)

        await asyncio.gather(*(client() for _ in range(SOAK_CLIENTS)))
    memory.append(teacher.memory_mib())
    # The first tenth warms up: threads, connections, the allocator's pools.
    warm = memory[SAMPLES // 10 :]
    return {
        "requests": SOAK_REQUESTS,
        "seconds": time.perf_counter() - started,
        "resident_mib": {"first": memory[0], "warm": warm[0], "last": warm[-1], "largest": max(warm)},
        "resident_mib_samples": [round(value, 1) for value in memory],
    }


async def flood(asker: Asker, teacher: Server) -> dict[str, Any]:
    deadline = time.monotonic() + FLOOD_S
    before, memory = teacher.memory_mib(), []

    async def client() -> None:
        while time.monotonic() < deadline:
            answer = await asker.ask()
            if answer is not None and answer.status_code in (429, 503):
                await asyncio.sleep(min(float(answer.headers["Retry-After"]), deadline - time.monotonic()))
            memory.append(teacher.memory_mib())

    await asyncio.gather(*(client() for _ in range(FLOOD_CLIENTS)))
    return {"clients": FLOOD_CLIENTS, "seconds": FLOOD_S, "resident_mib": {"before": before, "largest": max(memory)}}


async def measure(teacher: Server, folder: str) -> dict[str, Any]:
    options: dict[str, Any] = {"base_url": teacher.url, "timeout": 120.0}
    headers = {**HEADERS, "Accept": SAFETENSORS_MEDIA_TYPE}
    limits = httpx.Limits(max_connections=FLOOD_CLIENTS)
    figures: dict[str, Any] = {}
    async with httpx.AsyncClient(headers=headers, limits=limits, trust_env=False, **options) as client:
        for work in (soak, flood):
            asker = Asker(client, folder)
            outcome = await work(asker, teacher)
            figures[work.__name__] = {
                **outcome,
                "statuses": {str(status): count for status, count in sorted(asker.statuses.items())},
                "lost": asker.lost,
                "wrong": asker.wrong,
                "largest_error": asker.largest_error,
            }
    return figures


def main() -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = MODELS["small"].save(Path(parent) / "model")
        with server("teacher", Path(parent) / "log", "--teacher.model", folder) as teacher:
            figures = asyncio.run(measure(teacher, folder))
    results.write("endurance", figures)
    Console().print({name: {k: v for k, v in part.items() if "samples" not in k} for name, part in figures.items()})


if __name__ == "__main__":
    main()
