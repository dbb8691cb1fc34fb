"""What two ranks get from the collectives that are added to vLLM's CPU communicator."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from services.weight_transfer.cpu_collectives import add_collectives, all_gatherv, reduce_scatterv

SIZES = [1, 3]


def collect(rank: int, store: str, found: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = SimpleNamespace(world_size=2, rank_in_group=rank, device_group=torch.distributed.group.WORLD)
    own = torch.full((SIZES[rank], 2), 10.0 + rank)
    gathered = all_gatherv(group, [own, own.to(torch.int32)], 0, SIZES)
    even = all_gatherv(group, torch.tensor([rank]))
    rows = torch.arange(8.0).view(4, 2) * (1 + rank)
    scattered, halves = reduce_scatterv(group, rows, 0, SIZES), reduce_scatterv(group, rows)
    found.put((rank, [tensor.numpy() for tensor in (*gathered, even, scattered, halves)]))
    found.close()
    found.join_thread()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[list[Tensor]]:
    """Of each rank: rows of two dtypes gathered, one row of each rank gathered, rows of a sum in two cuts."""
    spawn = multiprocessing.get_context("spawn")
    found, store = spawn.Queue(), tmp_path_factory.mktemp("store") / "file"
    ranks = [spawn.Process(target=collect, args=(rank, str(Path(store)), found)) for rank in range(2)]
    for process in ranks:
        process.start()
    by_rank = dict(found.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    return [[torch.from_numpy(array) for array in by_rank[rank]] for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_gather_unequal_numbers_of_rows(rank: int, answers: list[list[Tensor]]) -> None:
    floats, integers, even, *_ = answers[rank]
    assert floats.tolist() == [[10.0, 10.0]] + [[11.0, 11.0]] * 3
    assert integers.tolist() == floats.tolist() and integers.dtype == torch.int32
    assert even.tolist() == [0, 1]


def test_each_rank_gets_its_rows_of_the_sum(answers: list[list[Tensor]]) -> None:
    assert answers[0][3].tolist() == [[0.0, 3.0]]
    assert answers[1][3].tolist() == [[6.0, 9.0], [12.0, 15.0], [18.0, 21.0]]
    assert [answers[rank][4].tolist() for rank in range(2)] == [[[0.0, 3.0], [6.0, 9.0]], [[12.0, 15.0], [18.0, 21.0]]]


def test_they_are_added_where_vllm_has_none() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    add_collectives()
    assert CpuCommunicator.all_gatherv is all_gatherv and CpuCommunicator.reduce_scatterv is reduce_scatterv
