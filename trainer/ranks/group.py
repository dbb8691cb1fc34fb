"""The processes that train one student together, and what they tell each other in collectives.

torchrun, `accelerate launch` and `distillserve up` say in the environment which of them a process is.
"""

import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from services.config import RunConfig
from services.errors import ConfigError, StartupError
from services.process.signals import Interruption

Result = TypeVar("Result")

_CPU = torch.device("cpu")
# Loading a large student takes its time, and ranks load in turns.
_JOIN_S = 600.0


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks; one that is alone needs no process group.

    Attributes:
        local_index: among those of this machine.
        local_count: ranks of this machine.
        device: on which this rank computes.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    local_count: int = 1
    device: torch.device = _CPU

    def gather(self, values: Tensor) -> Tensor:
        """[count, ...] from values [...] of the same shape on every rank; on the CPU, since they are few numbers."""
        if self.count == 1:
            return values.unsqueeze(0)
        gathered = values.new_empty((self.count, *values.shape))
        dist.all_gather(list(gathered.unbind()), values.contiguous())
        return gathered

    def in_turns(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which the ranks of a machine do one after another, for it takes much memory for a while."""
        rounds = int(self.gather(torch.tensor(self.local_count)).max())
        results = []
        for turn in range(rounds):
            if turn == self.local_index:
                results.append(work())
            self.gather(torch.tensor(turn))
        return results[0]

    def peak_memory_gib(self) -> float:
        """The most that any rank has held so far: of its GPU what tensors took, on a CPU the whole process."""
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device)
        else:
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return float(self.gather(torch.tensor(held)).max()) / 2**30

    def of_first(self, number: int) -> int:
        """The number that rank 0 has."""
        if self.count == 1:
            return number
        value = torch.tensor([number])
        dist.broadcast(value, 0)
        return int(value)


class GivenUp(Exception):
    """Rank 0 has ended the work of all ranks, at the same place in each."""


def check_together(ranks: Ranks, interruption: Interruption | None = None) -> None:
    """A place where all ranks end their work if rank 0 has to.

    Args:
        interruption: that of rank 0.

    Raises:
        Interrupted: on rank 0, which a signal asked to end.
        GivenUp: on the others.
    """
    if ranks.of_first(int(interruption is not None and interruption.is_due)):
        if interruption is not None:
            interruption.check()
        raise GivenUp


def is_of_ranks(error: BaseException) -> bool:
    """Whether torch says that a collective has failed, for which another rank may be the reason."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def join_ranks(config: RunConfig, environment: Mapping[str, str] = os.environ) -> Ranks:
    """Wait for the other ranks that the environment speaks of.

    Raises:
        ConfigError: the environment is incomplete, speaks of one rank where the run asks for several, or a rank has no GPU of
            its own.
        StartupError: the others have not come.
    """
    on_gpu = torch.cuda.is_available()
    count = _number(environment, "WORLD_SIZE", 1)
    if count == 1 and (wanted := config.trainer.num_processes) > 1:
        raise ConfigError(
            f"trainer.num_processes = {wanted}, but this trainer was started alone; start it with `distillserve up`, or with "
            f"`torchrun --nproc-per-node {wanted} -m services.cli train`"
        )
    if count == 1:
        return Ranks(device=torch.device("cuda", 0) if on_gpu else _CPU)
    index, local_index = _number(environment, "RANK"), _number(environment, "LOCAL_RANK")
    device = torch.device("cuda", local_index) if on_gpu else _CPU
    ranks = Ranks(index, count, local_index, _number(environment, "LOCAL_WORLD_SIZE", 1), device)
    if on_gpu:
        _take_gpu(ranks)
    try:
        # Few numbers travel between CPUs, whatever the ranks compute on.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=_JOIN_S))
    except (RuntimeError, ValueError) as error:
        where = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StartupError(
            f"rank {index} of {count} has not met the others at {where}: {reason}; start all of them with the same "
            "MASTER_ADDR, MASTER_PORT and WORLD_SIZE, as torchrun does"
        ) from error
    return ranks


def _take_gpu(ranks: Ranks) -> None:
    visible = torch.cuda.device_count()
    if ranks.local_index >= visible:
        raise ConfigError(
            f"{ranks.local_count} ranks were started on this machine, but the trainer sees {visible} GPUs, and each rank needs "
            "one of its own; start fewer, or name more with student.cuda_devices"
        )
    torch.cuda.set_device(ranks.device)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise ConfigError(
            f"{name} = {value!r} in the environment must be a number; start ranks with torchrun or `accelerate launch`, which "
            "set it"
        )
    return int(value)
