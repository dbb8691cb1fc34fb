"""What each rank of tests/integration/test_loss_ranks.py runs under torchrun: its sequences, DDP, the gradients."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from services.config import LossConfig
from tests.ranks import leave
from tests.unit.trainer.policies import random_batch, take
from trainer.loss import LossInputs, LossTotals, minillm_loss

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
SEQUENCES_OF_RANK = [[0, 1, 2], [3, 4]]


class Scale(nn.Module):
    """A model of one parameter, by which every log-probability of the student is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, batch: LossInputs) -> dict[str, Tensor]:
        return {name: value.detach() * self.factor for name, value in vars(batch).items() if name in STUDENT_LOGPROBS}


STUDENT_LOGPROBS = ("student_token_logprobs", "student_support_logprobs", "student_tail_logprob")


def gradient(model: nn.Module, sequences: list[int], aggregation: str) -> float:
    """d loss / d factor of the given sequences, with the totals and the scaling of all ranks."""
    batch, _ = take(random_batch(5), sequences)
    totals = LossTotals.of(batch.loss_mask, batch.cu_seqlens, 8).over_ranks()
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    config = LossConfig(gamma=0.9, aggregation=aggregation)
    loss, _ = minillm_loss(replace(batch, **model(batch)), config, totals)
    model.zero_grad()
    (num_ranks * loss).backward()
    (parameter,) = model.parameters()
    assert parameter.grad is not None
    return float(parameter.grad)


def main() -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(Scale())
    found = {name: gradient(model, SEQUENCES_OF_RANK[dist.get_rank()], name) for name in AGGREGATIONS}
    if dist.get_rank() == 0:
        torch.save(found, Path(sys.argv[1]) / "gradients.pt")
    dist.barrier()  # whoever leaves first must not take a reduction from the other


if __name__ == "__main__":
    main()
    leave()
