"""The output head against the obvious dense one, on CPU at the size of a real vocabulary; writes results/head.json.

Time: forward and backward of both, alternating in one process. Memory: a fresh process each, peak resident size less
the resident size with the inputs in place, so outputs and gradients count.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tests.benchmarks import results
from trainer.loss.head import HeadOutput, support_logprobs

NUM_POSITIONS, MANY_POSITIONS, HIDDEN, VOCABULARY, SUPPORT = 1024, 8192, 512, 151_936, 32
REPEATS = 7
EXACT_POSITIONS = 128
BYTES_PER_ROW = 4 * (HIDDEN + 2 * SUPPORT)  # d_hidden, support logits and their logprobs; a few numbers more


class Inputs(NamedTuple):
    hidden: Tensor  # [N, H], with gradient
    weight: Tensor  # [V, H], with gradient
    token_ids: Tensor  # [N], half of them in the support
    support_ids: Tensor  # [N, K]
    upstream: tuple[Tensor, Tensor, Tensor]  # gradients of token, support and tail


def inputs(num_positions: int, hidden_size: int = HIDDEN, vocabulary: int = VOCABULARY) -> Inputs:
    """Flat and sharp distributions (logits of standard deviation 2 to 6); the support is the top of a similar teacher."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, hidden_size, generator=generator).mul_(hidden_size**-0.5)
    hidden = torch.randn(num_positions, hidden_size, generator=generator)
    hidden *= torch.linspace(2, 6, num_positions).unsqueeze(-1)
    teacher = hidden * (1 + 0.3 * torch.randn(hidden.shape, generator=generator))
    support_ids = torch.cat([(rows @ weight.t()).topk(SUPPORT).indices for rows in teacher.split(64)])
    elsewhere = torch.randint(vocabulary, (num_positions,), generator=generator)
    token_ids = torch.where(torch.arange(num_positions) % 2 == 0, support_ids[:, 0], elsewhere)
    shapes = (num_positions,), (num_positions, SUPPORT), (num_positions,)
    token, support, tail = (torch.randn(shape, generator=generator) for shape in shapes)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), token_ids, support_ids, (token, support, tail))


def dense(hidden: Tensor, weight: Tensor, token_ids: Tensor, support_ids: Tensor) -> HeadOutput:
    """The same outputs from [N, V] log-probabilities, with gradients by autograd."""
    logprobs = torch.log_softmax(hidden @ weight.t(), -1)
    tail = logprobs.scatter(1, support_ids, -torch.inf).logsumexp(-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return HeadOutput(logprobs.gather(1, token_ids[:, None])[:, 0], logprobs.gather(1, support_ids), tail, entropy)


HEADS: dict[str, Callable[..., HeadOutput]] = {"ours": support_logprobs, "dense": dense}


def run(head: str, x: Inputs) -> tuple[Tensor, ...]:
    """Token, support, tail, entropy, d_hidden and d_weight."""
    output = HEADS[head](x.hidden, x.weight, x.token_ids, x.support_ids)
    gradients = torch.autograd.grad(output[:3], [x.hidden, x.weight], x.upstream)
    return (*(value.detach() for value in output), *gradients)


def times(x: Inputs) -> dict[str, list[float]]:
    """Seconds of a forward and backward of each head, in turn, after a warm-up."""
    seconds: dict[str, list[float]] = {head: [] for head in HEADS}
    for repeat in range(1 + REPEATS):
        for head in HEADS:
            started = time.perf_counter()
            run(head, x)
            if repeat:
                seconds[head].append(time.perf_counter() - started)
    return seconds


def errors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    """Largest difference over the largest value, of each output and gradient."""
    names = ("token_logprobs", "support_logprobs", "tail_logprob", "entropy", "d_hidden", "d_weight")
    pairs = zip(names, got, expected, strict=True)
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, a, b in pairs}


def exact(x: Inputs) -> tuple[Tensor, ...]:
    """`run` of the dense head in double precision, a few positions at a time."""
    weight, blocks = x.weight.detach().double().requires_grad_(), []
    for i in range(0, len(x.hidden), EXACT_POSITIONS):
        rows = slice(i, i + EXACT_POSITIONS)
        hidden = x.hidden.detach()[rows].double().requires_grad_()
        token, support, tail = (g[rows].double() for g in x.upstream)
        part = Inputs(hidden, weight, x.token_ids[rows], x.support_ids[rows], (token, support, tail))
        *of_rows, d_weight = run("dense", part)
        weight.grad = d_weight if weight.grad is None else weight.grad + d_weight
        blocks.append(of_rows)
    return (*(torch.cat(values) for values in zip(*blocks, strict=True)), weight.grad)


def resident(which: str) -> int:
    """Bytes in memory now (VmRSS), or most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def print_peak(head: str, num_positions: int) -> None:
    """What a fresh process does: print the bytes that one forward and backward takes beyond its inputs."""
    run(head, inputs(2, 8, 64))  # libraries and threads are not the head's
    x = inputs(num_positions)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    run(head, x)
    print(resident("VmHWM") - before)


def peak(head: str, num_positions: int) -> int:
    """`print_peak` of a fresh process."""
    program = f"from tests.benchmarks.head import print_peak; print_peak({head!r}, {num_positions})"
    command = [sys.executable, "-c", program]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    peaks = {head: peak(head, NUM_POSITIONS) for head in HEADS}
    many = peak("ours", MANY_POSITIONS)
    x = inputs(NUM_POSITIONS)
    seconds = times(x)
    got, float64 = {head: run(head, x) for head in HEADS}, exact(x)
    ratios = [ours / dense for ours, dense in zip(seconds["ours"], seconds["dense"], strict=True)]
    figures = {
        "sizes": {"positions": NUM_POSITIONS, "hidden": HIDDEN, "vocabulary": VOCABULARY, "support": SUPPORT},
        "threads": torch.get_num_threads(),
        "repeats": REPEATS,
        "seconds": {
            head: {"median": statistics.median(s), "min": min(s), "max": max(s)} for head, s in seconds.items()
        },
        "time_ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "peak_extra_bytes": peaks,
        "memory_ratio": peaks["ours"] / peaks["dense"],
        "many_positions": {
            "positions": MANY_POSITIONS,
            "peak_extra_bytes": many,
            "more_than_few": many - peaks["ours"],
            "of_which_rows": (MANY_POSITIONS - NUM_POSITIONS) * BYTES_PER_ROW,
        },
        "errors": {
            "ours_to_dense": errors(got["ours"], got["dense"]),
            "ours_to_float64": errors(got["ours"], float64),
            "dense_to_float64": errors(got["dense"], float64),
        },
    }
    results.write("head", figures)
    table = Table("head", "median", "fastest", "slowest", "peak memory")
    for head, s in figures["seconds"].items():
        table.add_row(head, *(f"{value:.2f} s" for value in s.values()), f"{peaks[head] / 2**20:.0f} MiB")
    table.add_row(
        "ratio", *(f"{value:.2f}" for value in figures["time_ratio"].values()), f"{figures['memory_ratio']:.2f}"
    )
    Console().print(table)
