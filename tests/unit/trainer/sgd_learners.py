"""Learners with plain SGD, so that updates can be followed by hand."""

from typing import Any

import torch

from services.config import RunConfig
from trainer.learner import Learner
from trainer.parallel import load_reference, place
from trainer.ranks.group import Ranks
from trainer.student import load_student

WINDOWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


def learner_of(folder: str, learning_rate: float = 0.1, **sections: dict[str, Any]) -> Learner:
    config = RunConfig(**sections | {"student": {"model": folder} | sections.get("student", {})})
    student = place(load_student(config.student), config, Ranks())
    learner = Learner(config, student, 10, reference=load_reference(config, Ranks()))
    learner.optimizer = torch.optim.SGD(student.parameters(), lr=learning_rate)
    learner.schedule = torch.optim.lr_scheduler.LambdaLR(learner.optimizer, lambda step: 1.0)
    return learner
