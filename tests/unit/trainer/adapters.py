"""Students with an adapter that has been trained a little."""

from typing import Any

import torch

from services.config import RunConfig
from tests.unit.trainer.samples import BATCH
from trainer.learner import Learner
from trainer.lora import trained_parameters
from trainer.student import load_student

LINEAR = {"gpt2": ["c_attn", "c_fc", "c_proj"], "phi3": ["qkv_proj", "o_proj"]}
"""Linear layers of an architecture where they are not called as below."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def learner_of(folder: str, *, steps: int = 0, rate: float = 1e-2, **options: Any) -> Learner:
    """A learner of the model in a folder, on the CPU, `steps` steps after its beginning.

    Args:
        options: of `[lora]`, or a section where they are a dictionary of one.
    """
    sections: dict[str, Any] = {name: options.pop(name) for name in ("student", "pipeline") if name in options}
    student = {"model": folder, **sections.pop("student", {})}
    config = RunConfig(student=student, lora={"r": 4, **options}, optimizer={"learning_rate": rate}, **sections)
    torch.manual_seed(0)
    learner = Learner(config, load_student(config.student, lora=config.lora), 100)
    for _ in range(steps):
        learner.step(BATCH)
    return learner


def disturb(learner: Learner, scale: float = 0.05) -> Learner:
    """Change everything that is trained at random, so that nothing of it is without effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(learner.student.model).values():
            parameter.add_(torch.randn_like(parameter) * scale)
    return learner
