"""Scored tokens per second: through our server, through vLLM's, and by a loop in one process, side by side.

Writes results/throughput.json. All three see the same sequences; the clients share the cores with the servers. Of vLLM's
answers the clients do no more than parse the JSON.
"""

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from services.clients import TeacherClient
from tests.benchmarks import results
from tests.benchmarks.scoring import (
    HEADERS,
    LONGEST,
    MODELS,
    TOP_K,
    Sequence,
    load,
    num_rows,
    our_head,
    plain_head,
    random_sequences,
    score_offline,
)
from tests.integration.processes import KEY, plain_vllm, server

NUM_CLIENTS = 8
REPEATS = 3
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Load:
    """What is scored with a model."""

    num_sequences: int
    sequences_per_request: int
    tokens_per_forward: int
    """Of the loop by hand; the fastest of 1024 to 32768 on two cores."""

    def requests(self) -> list[list[Sequence]]:
        sequences = random_sequences(self.num_sequences)
        return [
            sequences[i : i + self.sequences_per_request] for i in range(0, len(sequences), self.sequences_per_request)
        ]


LOADS = {"small": Load(256, 8, 4096), "large": Load(96, 4, 2048)}


class CountingTransport(httpx.AsyncHTTPTransport):
    """The network; counts the bytes of the answers' bodies."""

    num_bytes = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        self.num_bytes += int(response.headers["content-length"])
        return response


async def by_clients(requests: list[list[Sequence]], ask: Callable[[list[Sequence]], Awaitable[object]]) -> None:
    """Every request answered once; each client sends its next one when it has the answer to the last."""
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:
            await ask(request)

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))


async def through_ours(url: str, requests: list[list[Sequence]]) -> int:
    """Bytes of the answers."""
    transport = CountingTransport()
    async with TeacherClient([url], key=KEY, timeout_s=TIMEOUT_S, transport=transport) as client:
        await by_clients(requests, partial(client.score, top_k=TOP_K))
    return transport.num_bytes


async def through_vllm(url: str, model: str, requests: list[list[Sequence]]) -> int:
    """Bytes of the answers."""
    transport = CountingTransport()
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=TIMEOUT_S, transport=transport) as client:

        async def ask(sequences: list[Sequence]) -> None:
            prompts = [ids for ids, _ in sequences]
            body: dict[str, Any] = {"model": model, "prompt": prompts, "prompt_logprobs": TOP_K, "max_tokens": 1}
            answer = await client.post("/v1/completions", json=body)
            json.loads(answer.raise_for_status().content)

        await by_clients(requests, ask)
    return transport.num_bytes


def compare(folder: str, load_: Load, ours: str, vllm: str) -> dict[str, Any]:
    """Seconds of each way, in turns, and bytes per scored token."""
    requests = load_.requests()
    warm_up = requests[:NUM_CLIENTS]
    asyncio.run(through_ours(ours, warm_up))
    asyncio.run(through_vllm(vllm, folder, warm_up))
    sequences = [sequence for request in requests for sequence in request]
    model, output = load(folder)
    ours_head, torchs_head = our_head(output), plain_head(output)
    num_bytes: dict[str, int] = {}

    def http(name: str, work: Callable[[], Any]) -> None:
        num_bytes[name] = asyncio.run(work())

    ways: dict[str, Callable[[], None]] = {
        "ours": lambda: http("ours", lambda: through_ours(ours, requests)),
        "offline": lambda: score_offline(model, ours_head, sequences, load_.tokens_per_forward),
        "offline_plain": lambda: score_offline(model, torchs_head, sequences, load_.tokens_per_forward),
        "vllm": lambda: http("vllm", lambda: through_vllm(vllm, folder, requests)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    rows = num_rows(sequences)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(output.weight),
        "sequences": len(sequences),
        "sequences_per_request": load_.sequences_per_request,
        "scored_tokens": rows,
        "scored_tokens_per_s": {
            name: {"median": rows / statistics.median(s), "slowest": rows / max(s), "fastest": rows / min(s)}
            for name, s in seconds.items()
        },
        "ours_to": {
            name: statistics.median([theirs / ours for theirs, ours in zip(s, seconds["ours"], strict=True)])
            for name, s in seconds.items()
            if name != "ours"
        },
        "bytes_per_scored_token": {name: total / rows for name, total in num_bytes.items()},
    }


def main() -> None:
    figures = {}
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as parent:
            folder, logs = model.save(Path(parent) / "model"), Path(parent)
            limits = ["--max-logprobs", str(TOP_K), "--max-model-len", str(LONGEST + 1)]
            with (
                server("teacher", logs / "ours", "--teacher.model", folder) as ours,
                plain_vllm(folder, logs / "vllm", *limits, "--kv-cache-memory-bytes", str(1 << 30)) as vllm,
            ):
                figures[name] = compare(folder, LOADS[name], ours.url, vllm.url)
                # What packing instead of padding could save at most.
                figures[name]["batch_fill"] = ours.metric("batch_fill_ratio_sum") / ours.metric(
                    "batch_fill_ratio_count"
                )
    results.write("throughput", {"top_k": TOP_K, "clients": NUM_CLIENTS, "repeats": REPEATS, "models": figures})
    table = Table("model", "way", "scored tokens/s", "ours to it", "bytes a token")
    for name, of_model in figures.items():
        for way, speed in of_model["scored_tokens_per_s"].items():
            ratio, size = of_model["ours_to"].get(way, 1.0), of_model["bytes_per_scored_token"].get(way)
            table.add_row(name, way, f"{speed['median']:.0f}", f"{ratio:.2f}", "" if size is None else f"{size:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
