"""One step of a learner, what each process of tests/integration/test_step_memory.py runs; prints its memory as JSON, MiB.

Arguments: the model's folder, completions in the step, completions in a micro-batch.
"""

import json
import os
import sys

import numpy as np
import torch

from services.config import RunConfig
from services.wire.batch import TrainingBatch
from tests.benchmarks.memory import Memory
from trainer.learner import Learner
from trainer.student import load_student

PROMPT_LENGTH, LENGTH, TOP_K = 16, 2048, 32


def random_batch(num_completions: int, vocab: int) -> TrainingBatch:
    """Completions of random tokens, with random candidates of a teacher."""
    random, num_tokens = np.random.default_rng(0), num_completions * LENGTH
    logprobs = np.log(random.dirichlet(np.ones(TOP_K + 1), num_tokens)).astype(np.float32)
    first = random.integers(0, vocab // TOP_K, (num_tokens, TOP_K), dtype=np.int32)
    return TrainingBatch(
        rows=np.arange(num_completions),
        groups=np.arange(num_completions),
        prompt_lengths=np.full(num_completions, PROMPT_LENGTH),
        completion_lengths=np.full(num_completions, LENGTH),
        truncated=np.zeros(num_completions, np.bool_),
        policy_versions=np.zeros(num_completions, np.int64),
        prompt_ids=random.integers(0, vocab, num_completions * PROMPT_LENGTH, dtype=np.int32),
        token_ids=random.integers(0, vocab, num_tokens, dtype=np.int32),
        rollout_logprobs=random.normal(-12.0, 0.1, num_tokens).astype(np.float32),
        teacher_token_logprobs=random.normal(-12.0, 1.0, num_tokens).astype(np.float32),
        support_ids=first + (vocab // TOP_K * np.arange(TOP_K)).astype(np.int32),
        teacher_support_logprobs=logprobs[:, :TOP_K],
        teacher_tail_logprob=logprobs[:, TOP_K],
    )


def main() -> None:
    folder, num_completions, per_micro_batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    tokens = per_micro_batch * (PROMPT_LENGTH + LENGTH)
    config = RunConfig(student={"model": folder}, pipeline={"tokens_per_micro_batch": tokens})
    learner = Learner(config, load_student(config.student), num_steps=1)
    batch = random_batch(num_completions, learner.student.vocab_size)
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
