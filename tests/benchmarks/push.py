"""What a push of a 235 M student costs, against the least that it could; writes results/push.json.

The least is the sum of a broadcast, of vLLM's load_weights and of packing the tied head, each measured alone
(tests/benchmarks/bare_push.py). Beside the seconds: the memory that a push takes on either side above what is held between
pushes, against two buckets, and what vLLM's own loading takes of it; the canary against the rollouts of a small step; and
how long the event loops of the trainer and of the API server did not answer, measured from outside for the latter, by
/health. On few cores they wait for a processor too: the rollouts show how long without a push.
"""

import asyncio
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from services.clients import RolloutClient
from services.config import RunConfig
from services.schemas import RolloutSampling
from tests.benchmarks import bare_push, results
from tests.benchmarks.memory import Memory
from tests.integration.processes import KEY, server
from trainer.model import load_student
from trainer.prompts import Prompt
from trainer.tiny_pair import build_tokenizer
from trainer.weight_sync import WeightSync

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 48
REPEATS = 5
_TICK_S = 0.005
_HEALTH_EVERY_S = 0.01


def save_student(folder: Path) -> str:
    """Gemma 3's shape of 270 M parameters with 12 of its 18 layers; weights do not change what a push costs."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    shape = Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        intermediate_size=2048,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Gemma3ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@asynccontextmanager
async def attached(
    model: PreTrainedModel, url: str, prompts: list[list[int]]
) -> AsyncIterator[tuple[WeightSync, RolloutClient]]:
    """The trainer's end with the options of a run."""
    async with RolloutClient([url], key=KEY) as client:
        canaries = [Prompt(row=1, token_ids=ids, text="") for ids in prompts[: RunConfig().weight_sync.canary_prompts]]
        sync = WeightSync(RunConfig(), model, client, await client.info(), canaries, KEY, run="benchmark")
        try:
            await sync.hold()
            yield sync, client
        finally:
            await sync.close()


@contextmanager
def longest_tick(found: dict[str, float], name: str) -> Iterator[None]:
    """Milliseconds that the running event loop did not come round inside, beyond what was asked for."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            started = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            longest = max(longest, time.perf_counter() - started - _TICK_S)

    ticking = asyncio.get_running_loop().create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        found[name] = 1000 * longest


def ask_health(url: str, connection: Connection) -> None:
    """In a process of its own: until told to end, /health every 10 ms; answers the longest wait, milliseconds."""
    longest = 0.0
    with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
        client.get("/health").raise_for_status()
        connection.send("asking")
        while not connection.poll(_HEALTH_EVERY_S):
            started = time.perf_counter()
            client.get("/health").raise_for_status()
            longest = max(longest, time.perf_counter() - started)
    connection.send(1000 * longest)


@contextmanager
def longest_health(url: str, found: dict[str, float], name: str) -> Iterator[None]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    asking = multiprocessing.get_context("spawn").Process(target=ask_health, args=(url, theirs))
    asking.start()
    ours.recv()
    try:
        yield
    finally:
        ours.send("end")
        found[name] = ours.recv()
        asking.join()


@contextmanager
def watched_loops(url: str, found: dict[str, float], what: str) -> Iterator[None]:
    """How long either event loop was blocked inside."""
    with (
        longest_health(url, found, f"{what}_blocks_server_ms"),
        longest_tick(found, f"{what}_blocks_trainer_ms"),
    ):
        yield


def bare_parts(folder: str, answer: Path) -> dict[str, list[float]]:
    bucket_bytes = str(RunConfig().weight_sync.bucket_bytes)
    subprocess.run([sys.executable, "-m", "tests.benchmarks.bare_push", folder, bucket_bytes, str(answer)], check=True)
    found: dict[str, list[float]] = json.loads(answer.read_text())
    return found


@torch.no_grad()
def change(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.0001)


async def measure(url: str, worker_pid: int, folder: str) -> list[dict[str, float]]:
    """Of each push but the first, which also connects."""
    model = load_student(RunConfig(student={"model": folder}).student)
    prompts = torch.randint(0, 200, (NUM_PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    sides = {"trainer": Memory(psutil.Process().pid), "worker": Memory(worker_pid)}
    rounds = []
    async with attached(model, url, prompts) as (sync, client):
        for version in range(REPEATS + 1):
            change(model)
            found: dict[str, float] = {}
            with watched_loops(url, found, "rollouts"):
                started = time.perf_counter()
                await client.generate(prompts, RolloutSampling(max_new_tokens=NEW_TOKENS))
                found["rollouts_s"] = time.perf_counter() - started
            held = {side: memory.now() for side, memory in sides.items()}
            for memory in sides.values():
                memory.reset()
            with watched_loops(url, found, "push"):
                pushed = await sync.push(version)
            found |= {name: pushed[name] for name in ("push_s", "canary_s", "canary_residual")}
            found |= {f"{side}_extra_mib": memory.peak() - held[side] for side, memory in sides.items()}
            rounds.append(found)
    return rounds


def worker_of(server_pid: int) -> int:
    """The process that holds the model."""
    return max(psutil.Process(server_pid).children(recursive=True), key=lambda child: child.memory_info().rss).pid


def main() -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = save_student(Path(parent) / "student")
        parts = bare_parts(folder, Path(parent) / "bare.json")
        options = ["--rollout.max_model_len", "256", "--sampling.max_new_tokens", str(NEW_TOKENS)]
        with server("rollout", Path(parent) / "log", "--student.model", folder, *options) as rollout:
            first, *rounds = asyncio.run(measure(rollout.url, worker_of(rollout.process.pid), folder))
    medians = {name: statistics.median([found[name] for found in rounds]) for name in rounds[0]}
    least = sum(statistics.median(parts[name]) for name in bare_push.PARTS)
    figures: dict[str, Any] = {
        "bucket_mib": RunConfig().weight_sync.bucket_mib,
        "bare": parts,
        "first_push": first,
        "pushes": rounds,
        "median": medians,
        "push_to_bare_sum": medians["push_s"] / least,
        "canary_to_rollouts": medians["canary_s"] / medians["rollouts_s"],
        "longest_blocked_ms": {
            side: max(found[f"push_blocks_{side}_ms"] for found in rounds) for side in ("server", "trainer")
        },
    }
    results.write("push", figures)
    table = Table("what", "median")
    for name, values in parts.items():
        table.add_row(f"bare {name}", f"{statistics.median(values):.3g}")
    for name, median in medians.items():
        table.add_row(name, f"{median:.3g}")
    for name in ("push_to_bare_sum", "canary_to_rollouts"):
        table.add_row(name, f"{figures[name]:.2f}")
    Console().print(table)
