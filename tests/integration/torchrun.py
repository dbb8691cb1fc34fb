"""Runs of several ranks under torchrun, as users start them, for tests that end one of them."""

import subprocess
import sys
from pathlib import Path

from services.process.startup import free_port
from tests.integration.processes import environment, is_running

MODULE = ["-m", "services.cli", "train"]


def torchrun(*arguments: str, nodes: int = 1, ranks: int = 2, log: Path) -> "list[subprocess.Popen[bytes]]":
    """A torchrun for each of the "nodes", each with `ranks` ranks, a thread a rank.

    Args:
        log: of all of them.
    """
    started, port = [], free_port("127.0.0.1", 0)
    for node in range(nodes):
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--nnodes", str(nodes)]
        words += ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*words, *MODULE, *arguments],
                env={**environment(), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
    return started


def rank_process(torchruns: "list[subprocess.Popen[bytes]]", rank: int) -> int:
    """Process id of a rank."""
    for process in torchruns:
        for child in map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
            variables = Path(f"/proc/{child}/environ").read_text().split("\0")
            if f"RANK={rank}" in variables and is_running(child):
                return child
    raise AssertionError(f"no process of rank {rank}")


def all_ranks(torchruns: "list[subprocess.Popen[bytes]]", count: int) -> list[int]:
    return [rank_process(torchruns, rank) for rank in range(count)]
