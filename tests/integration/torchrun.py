"""Runs of several ranks under torchrun or `accelerate launch`, as users start them, for tests that end one of them."""

import subprocess
import sys
from pathlib import Path

from services.process.startup import free_port
from tests.integration.processes import environment, is_running

TRAIN = ["services.cli", "train"]


def accelerate_launch(*arguments: str, log: Path) -> "subprocess.Popen[bytes]":
    """Two ranks; --multi_gpu is its word for several processes, on a machine without GPUs as well."""
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    return _start([*words, "--num_machines", "1", "--main_process_port", "0", "--module", *TRAIN, *arguments], log)


def torchrun(*arguments: str, nodes: int = 1, ranks: int = 2, log: Path) -> "list[subprocess.Popen[bytes]]":
    """A torchrun for each of the "nodes", each with `ranks` ranks, a thread a rank.

    Args:
        log: of all of them.
    """
    started, port = [], free_port("127.0.0.1", 0)
    for node in range(nodes):
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--nnodes", str(nodes)]
        words += ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        started.append(_start([*words, "-m", *TRAIN, *arguments], log))
    return started


def _start(words: list[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("ab") as output:
        variables = {**environment(), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(words, env=variables, stdout=output, stderr=subprocess.STDOUT)


def rank_process(launchers: "list[subprocess.Popen[bytes]]", rank: int) -> int:
    """Process id of a rank."""
    for process in launchers:
        for child in map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
            variables = Path(f"/proc/{child}/environ").read_text().split("\0")
            if f"RANK={rank}" in variables and is_running(child):
                return child
    raise AssertionError(f"no process of rank {rank}")


def all_ranks(launchers: "list[subprocess.Popen[bytes]]", count: int) -> list[int]:
    return [rank_process(launchers, rank) for rank in range(count)]
