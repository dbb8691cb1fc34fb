"""Two collectives that vLLM's CPU communicator lacks, and which a mixture of experts with data parallelism needs.

A defect of vLLM 0.32: there it gathers the tokens of all engines before the experts and scatters their sums afterwards, on a
CPU too, where both are NotImplementedError: the engines die at the first request.
"""

from typing import Any

import torch
from torch import Tensor


def add_collectives() -> None:
    """Give them to vLLM's CPU communicator, unless it has its own."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    for method in (all_gatherv, reduce_scatterv):
        if method.__name__ not in vars(CpuCommunicator):
            setattr(CpuCommunicator, method.__name__, method)


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """The rows of all ranks, one rank after the other.

    Args:
        self: the communicator.
        input_: a tensor [sizes[own rank], ...], or a list of them.
        dim: 0.
        sizes: rows of each rank; default: all have as many.

    Returns:
        [sum of sizes, ...], or a list of them.
    """
    assert dim == 0
    if isinstance(input_, list):
        return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    sizes = sizes or [len(input_)] * self.world_size
    # gloo gathers tensors of one size alone.
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded, group=self.device_group)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])


def reduce_scatterv(self: Any, input_: Tensor, dim: int = 0, sizes: list[int] | None = None) -> Tensor:
    """The own rows of the sum over all ranks.

    Args:
        self: the communicator.
        input_: [sum of sizes, ...].
        dim: 0.
        sizes: rows of each rank; default: all get as many.

    Returns:
        [sizes[own rank], ...].
    """
    assert dim == 0
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    summed = input_.clone()
    torch.distributed.all_reduce(summed, group=self.device_group)
    return summed.split(sizes)[self.rank_in_group].clone()
