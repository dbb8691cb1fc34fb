"""Learners with plain SGD, so that updates can be followed by hand."""

from typing import Any

import torch

from services.config import RunConfig
from trainer.data.stream import RowStream
from trainer.learner import Learner
from trainer.parallel import compute_dtype_of
from trainer.student import load_student

WINDOWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


def learner_of(folder: str, learning_rate: float = 0.1, texts: bool = False, **sections: dict[str, Any]) -> Learner:
    config = RunConfig(**sections | {"student": {"model": folder} | sections.get("student", {})})
    student = load_student(config.student, compute_dtype=compute_dtype_of(config, torch.device("cpu")))
    learner = Learner(config, student, 10, RowStream(WINDOWS, seed=0, shuffle=False) if texts else None)
    learner.optimizer = torch.optim.SGD(student.parameters(), lr=learning_rate)
    learner.schedule = torch.optim.lr_scheduler.LambdaLR(learner.optimizer, lambda step: 1.0)
    return learner
