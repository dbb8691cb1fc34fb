"""The trainer's ranks: what tells a process which of them it is, and where it finds the others.

`up` starts them itself: torchrun kills what still lives 30 s after a rank has ended, and saving a large student takes minutes.
"""

import os
import re
from collections.abc import Mapping

MASTER_ADDRESS = "127.0.0.1"
# What torchrun gives its processes; `up` may have been started by one.
_OF_A_LAUNCHER = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*)")


def without_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment that makes a process no rank of anything."""
    return {name: value for name, value in environment.items() if not _OF_A_LAUNCHER.fullmatch(name)}


def with_rank(environment: Mapping[str, str], rank: int, num_ranks: int, master_port: int) -> dict[str, str]:
    """An environment as torchrun gives it to a rank of this machine, whose cores the ranks share unless the user has said
    how many threads each one has; a rank that is alone needs none of it."""
    if num_ranks == 1:
        return dict(environment)
    return {"OMP_NUM_THREADS": str(max(1, _num_cores() // num_ranks)), **environment} | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": MASTER_ADDRESS,
        "MASTER_PORT": str(master_port),
    }


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
