"""One step of a learner, what each process of tests/integration/test_step_memory.py runs; prints its memory as JSON, MiB.

Arguments: the model's folder, completions in the step, completions in a micro-batch.
"""

import json
import os
import sys

import numpy as np
import torch

from services.config import RunConfig
from tests.benchmarks.memory import Memory
from tests.random_batches import random_batch
from trainer.learner import Learner
from trainer.student import load_student

PROMPT_LENGTH, LENGTH, TOP_K = 16, 2048, 32


def main() -> None:
    folder, num_completions, per_micro_batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    tokens = per_micro_batch * (PROMPT_LENGTH + LENGTH)
    config = RunConfig(student={"model": folder}, pipeline={"tokens_per_micro_batch": tokens})
    learner = Learner(config, load_student(config.student), num_steps=1)
    batch = random_batch([LENGTH] * num_completions, PROMPT_LENGTH, TOP_K, learner.student.vocab_size)
    memory = Memory(os.getpid())
    memory.reset()
    before = memory.now()
    metrics = learner.step(batch)
    assert metrics["num_valid_tokens"] == num_completions * LENGTH
    columns = sum(column.nbytes for column in vars(batch).values() if isinstance(column, np.ndarray)) / 2**20
    num_parameters = sum(p.numel() for p in learner.student.parameters())
    figures = {"before": before, "peak": memory.peak(), "batch": columns, "parameters": num_parameters}
    print(json.dumps(figures))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
