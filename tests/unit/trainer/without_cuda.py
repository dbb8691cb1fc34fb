"""A program: one step, a snapshot and a saved student, with every function of torch.cuda that needs a GPU forbidden."""

import inspect
import sys
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from services.config import RunConfig
from services.models.causal_lm import load_tokenizer
from tests.ranks import leave
from tests.unit.trainer.samples import BATCH
from trainer.learner import Learner
from trainer.output.saving import SavedStudents
from trainer.parallel import load_and_place
from trainer.ranks.group import join_ranks
from trainer.weights.snapshot import GivenTokens

# They answer without a GPU: what is there, and a seed that is kept until CUDA is used.
HARMLESS = {"is_available", "device_count", "is_initialized", "manual_seed_all"}


def forbid_cuda() -> None:
    """Let everything that would start CUDA, or ask it something, raise."""

    def forbidden(name: str) -> Any:
        def raises(*_: object, **__: object) -> NoReturn:
            raise AssertionError(f"torch.cuda.{name} was called")

        return raises

    functions = {name for name, value in vars(torch.cuda).items() if inspect.isfunction(value) and name[0] != "_"}
    for name in functions - HARMLESS | {"_lazy_init"}:
        setattr(torch.cuda, name, forbidden(name))


def main(model: str, folder: str) -> None:
    forbid_cuda()
    config = RunConfig(student={"model": model}, output={"dir": folder})
    ranks = join_ranks(config)
    learner, given = Learner(config, load_and_place(config, ranks), 2, ranks), GivenTokens([[1, 2]] * 2, [[3, 4]] * 2)
    learner.snapshot(0, torch.bfloat16, given)
    assert learner.step(BATCH)["grad_norm"] > 0
    snapshot, state = learner.snapshot(1, torch.bfloat16, given), learner.state()
    if ranks.index == 0:
        assert {tensor.device.type for _, tensor in snapshot.source} == {"cpu"}
        SavedStudents(config.output, learner.student.model, load_tokenizer(model)).save(state)
    assert not torch.cuda.is_initialized()
    if ranks.count > 1:
        dist.barrier()
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
