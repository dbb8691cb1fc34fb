"""The head with a weight sharded over two processes: gathered once, its gradient the mean over ranks."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from trainer.loss import head as lm_head
from trainer.loss.head import HeadOutput, support_logprobs

N, H, V, K = 7, 5, 151, 4  # V is odd: the shards have 76 and 75 rows
WORLD_SIZE = 2
ALL_GATHER = torch.ops.c10d_functional.all_gather_into_tensor
REDUCE_SCATTER = torch.ops.c10d_functional.reduce_scatter_tensor


def in_two_processes(tmp_path: Path, check: Callable[[int, DeviceMesh], None]) -> None:
    mp.spawn(_process, (str(tmp_path / "rendezvous"), check), WORLD_SIZE)


def _process(rank: int, path: str, check: Callable[[int, DeviceMesh], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD_SIZE)
    check(rank, init_device_mesh("cpu", (WORLD_SIZE,)))  # an exception reaches the parent through its file
    dist.barrier()
    # The checks are done; torch's own teardown after FSDP sometimes aborts ("terminate called without an active exception").
    os._exit(0)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, rank: int) -> HeadOutput:
    """Every rank has its own tokens, in three chunks."""
    generator = torch.Generator().manual_seed(10 + rank)
    ids = torch.rand(N, V, generator=generator).argsort(-1)[:, : K + 1]
    return support_logprobs(hidden, weight, ids[:, 0], ids[:, 1:], bias=bias, chunk_tokens=3)


def loss_of(output: HeadOutput) -> Tensor:
    return output.token_logprobs.sum() + output.support_logprobs.square().sum() + 3 * output.tail_logprob.sum()


def mean_over_ranks(x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total / WORLD_SIZE


def check_sharded_weight(rank: int, mesh: DeviceMesh) -> None:
    lm_head.MAX_TILE_ELEMENTS = 1  # three tiles of the vocabulary
    weight, bias = (randn(*shape, seed=3).requires_grad_() for shape in ((V, H), (V,)))
    hidden = randn(N, H, seed=rank).requires_grad_()
    expected = head(hidden, weight, bias, rank)
    d_hidden, d_weight, d_bias = torch.autograd.grad(loss_of(expected), [hidden, weight, bias])

    sharded = [distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in (weight, bias)]
    with CommDebugMode() as forward:
        got = head(hidden, *sharded, rank)
    assert forward.get_comm_counts() == {ALL_GATHER: 2}  # weight and bias
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with CommDebugMode() as backward:
        loss_of(got).backward()
    assert backward.get_comm_counts() == {REDUCE_SCATTER: 2}
    torch.testing.assert_close(hidden.grad, d_hidden)
    for parameter, local in zip(sharded, (d_weight, d_bias), strict=True):
        assert isinstance(parameter.grad, DTensor) and parameter.grad.placements == (Shard(0),)
        shard = mean_over_ranks(local).chunk(WORLD_SIZE)[rank]
        torch.testing.assert_close(parameter.grad.to_local(), shard)


def check_tied_weight_under_fsdp(rank: int, mesh: DeviceMesh) -> None:
    """The weight makes the hidden states in its module's forward, reduced by FSDP2, and is the head's outside of it."""
    module = nn.Linear(H, V, bias=False, dtype=torch.float64)
    module.load_state_dict({"weight": randn(V, H, seed=3)})
    inputs, mixing = randn(N, H, seed=rank), randn(V, H, seed=4)

    def loss() -> Tensor:
        hidden = module(inputs) @ mixing / V
        return loss_of(head(hidden, module.weight, None, rank))

    (local,) = torch.autograd.grad(loss(), [module.weight])
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    loss().backward()
    assert isinstance(module.weight, DTensor) and isinstance(module.weight.grad, DTensor)
    torch.testing.assert_close(module.weight.grad.full_tensor(), mean_over_ranks(local))


def test_sharded_weight_is_gathered_once_and_gets_the_mean_gradient(tmp_path: Path) -> None:
    in_two_processes(tmp_path, check_sharded_weight)


def test_gradient_of_a_tied_weight_adds_to_that_of_fsdp(tmp_path: Path) -> None:
    in_two_processes(tmp_path, check_tied_weight_under_fsdp)
