"""What a push of a 235 M student costs, against the least that it could; writes results/push.json.

The least is the sum of a broadcast, of vLLM's load_weights and of packing the tied head, each measured alone
(tests/benchmarks/bare_push.py). Beside the seconds: the memory that a push takes on either side above what is held between
pushes, against two buckets, and what vLLM's own loading takes of it; the canary against the rollouts of a small step.

Of other pushes, since to watch costs a part of the processors: how long the event loops of the trainer and of the API server
were late, the latter measured from outside, by /health; and how long they were blocked, which leaves out the time that Linux
says their threads waited for a processor. How late everybody is shows a process that has no part in the push and only sleeps.
"""

import asyncio
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import threading
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
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from services.clients import RolloutClient
from services.config import RunConfig
from services.wire.rollout import RolloutSampling
from tests.benchmarks import bare_push, results
from tests.benchmarks.memory import Memory
from tests.integration.processes import KEY, server
from tests.pushing import Pushing, learner_of
from trainer.data.prompts import Prompt
from trainer.learner import Learner
from trainer.tiny.pair import build_tokenizer
from trainer.weights.weight_sync import WeightSync

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 48
REPEATS = 5
Rounds = list[dict[str, float]]
_TICK_S = 0.005
_HEALTH_EVERY_S = 0.01


def save_student(folder: Path, num_layers: int = 12) -> str:
    """Gemma 3's shape of 270 M parameters with 12 of its 18 layers, 235 M; weights do not change what a push costs."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    shape = Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        num_hidden_layers=num_layers,
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
    learner: Learner, url: str, prompts: list[list[int]]
) -> AsyncIterator[tuple[Pushing, RolloutClient]]:
    """The trainer's end with the options of a run."""
    async with RolloutClient([url], key=KEY) as client:
        canaries = [Prompt(row=1, token_ids=ids, text="") for ids in prompts[: RunConfig().weight_sync.canary_prompts]]
        sync = WeightSync(
            RunConfig(), learner.ranks.device, client, await client.info(), canaries, KEY, run="benchmark"
        )
        try:
            await sync.hold()
            yield Pushing(sync, learner), client
        finally:
            await sync.close()


def waited_for_processor(thread: int) -> float:
    """Seconds that a thread could have run and did not, since it began (/proc/.../schedstat)."""
    return int(Path(f"/proc/{thread}/schedstat").read_text().split()[1]) / 1e9


@contextmanager
def longest_tick(found: dict[str, float]) -> Iterator[None]:
    """Milliseconds that the running event loop did not come round inside, beyond what was asked for."""
    late = blocked = 0.0
    thread = threading.get_native_id()

    async def tick() -> None:
        nonlocal late, blocked
        while True:
            started, waited = time.perf_counter(), waited_for_processor(thread)
            await asyncio.sleep(_TICK_S)
            lateness = time.perf_counter() - started - _TICK_S
            late = max(late, lateness)
            blocked = max(blocked, lateness - waited_for_processor(thread) + waited)

    ticking = asyncio.get_running_loop().create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        found |= {"trainer_late_ms": 1000 * late, "trainer_blocked_ms": 1000 * blocked}


def ask_health(url: str, server_thread: int, connection: Connection) -> None:
    """In a process of its own: until told to end, /health every 10 ms.

    Answers the longest time that it took, without the waits for a processor too, and that this process, which has nothing
    else to do, overslept; milliseconds.
    """
    late = blocked = overslept = 0.0
    threads = (server_thread, threading.get_native_id())
    with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
        client.get("/health").raise_for_status()
        connection.send("asking")
        while True:
            started = time.perf_counter()
            if connection.poll(_HEALTH_EVERY_S):
                break
            woke, waited = time.perf_counter(), sum(map(waited_for_processor, threads))
            client.get("/health").raise_for_status()
            lateness = time.perf_counter() - woke
            late = max(late, lateness)
            blocked = max(blocked, lateness - sum(map(waited_for_processor, threads)) + waited)
            overslept = max(overslept, woke - started - _HEALTH_EVERY_S)
    named = {"server_late": late, "server_blocked": blocked, "uninvolved_late": overslept}
    connection.send({f"{name}_ms": 1000 * seconds for name, seconds in named.items()})


@contextmanager
def watched_loops(url: str, server_thread: int) -> Iterator[dict[str, float]]:
    """How long either event loop did not answer in the body, and how long a process that had nothing to do overslept."""
    found: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    asking = context.Process(target=ask_health, args=(url, server_thread, theirs))
    asking.start()
    ours.recv()
    try:
        with longest_tick(found):
            yield found
    finally:
        ours.send("end")
        found |= ours.recv()
        asking.join()


def bare_parts(folder: str, answer: Path) -> dict[str, list[float]]:
    bucket_bytes = str(RunConfig().weight_sync.bucket_bytes)
    subprocess.run([sys.executable, "-m", "tests.benchmarks.bare_push", folder, bucket_bytes, str(answer)], check=True)
    found: dict[str, list[float]] = json.loads(answer.read_text())
    return found


@torch.no_grad()
def change(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.0001)


async def measure(url: str, server_pid: int, folder: str) -> tuple[dict[str, float], Rounds, Rounds]:
    """The first push, which also connects; then pushes whose cost is measured, and pushes that are watched, in turn."""
    learner = learner_of(folder)
    prompts = torch.randint(0, 200, (NUM_PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    sides = {"trainer": Memory(psutil.Process().pid), "worker": Memory(worker_of(server_pid))}
    costs, watched = [], []
    async with attached(learner, url, prompts) as (pushing, client):
        first = await pushing.push(0)
        for repeat in range(REPEATS):
            change(learner.student)
            found: dict[str, float] = {}
            started = time.perf_counter()
            await client.generate(prompts, RolloutSampling(max_new_tokens=NEW_TOKENS))
            found["rollouts_s"] = time.perf_counter() - started
            held = {side: memory.now() for side, memory in sides.items()}
            for memory in sides.values():
                memory.reset()
            found |= await pushing.push(2 * repeat + 1)
            costs.append(found | {f"{side}_extra_mib": memory.peak() - held[side] for side, memory in sides.items()})
            change(learner.student)
            with watched_loops(url, server_pid) as loops:
                await pushing.push(2 * repeat + 2)
            watched.append(loops)
    return first, costs, watched


def worker_of(server_pid: int) -> int:
    """The process that holds the model."""
    return max(psutil.Process(server_pid).children(recursive=True), key=lambda child: child.memory_info().rss).pid


def main() -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = save_student(Path(parent) / "student")
        parts = bare_parts(folder, Path(parent) / "bare.json")
        options = ["--rollout.max_model_len", "256", "--sampling.max_new_tokens", str(NEW_TOKENS)]
        with server("rollout", Path(parent) / "log", "--student.model", folder, *options) as rollout:
            first, costs, watched = asyncio.run(measure(rollout.url, rollout.process.pid, folder))
    medians = {
        name: statistics.median([found[name] for found in rounds]) for rounds in (costs, watched) for name in rounds[0]
    }
    least = sum(statistics.median(parts[name]) for name in bare_push.PARTS)
    figures: dict[str, Any] = {
        "bucket_mib": RunConfig().weight_sync.bucket_mib,
        "bare": parts,
        "first_push": first,
        "pushes": costs,
        "watched_pushes": watched,
        "median": medians,
        "push_to_bare_sum": medians["push_s"] / least,
        "canary_to_rollouts": medians["canary_s"] / medians["rollouts_s"],
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
