"""A program: one step, a snapshot and a saved student, with every function of torch.cuda that needs a GPU forbidden."""

import inspect
import sys
from typing import Any, NoReturn

import torch

from services.config import RunConfig
from services.models.causal_lm import load_tokenizer
from tests.unit.trainer.samples import BATCH
from trainer.learner import Learner
from trainer.output.saving import SavedStudents
from trainer.student import load_student
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
    learner = Learner(config, load_student(config.student), num_steps=2)
    assert learner.step(BATCH)["grad_norm"] > 0
    snapshot = learner.snapshot(1, torch.bfloat16, GivenTokens([[1, 2]], [[3, 4]]))
    assert {tensor.device.type for _, tensor in snapshot.source} == {"cpu"}
    SavedStudents(config.output, learner.student.model, load_tokenizer(model)).save(1)
    assert not torch.cuda.is_initialized()


if __name__ == "__main__":
    main(*sys.argv[1:])
