"""Batches of random tokens, of any size, for what measures time or memory."""

from collections.abc import Sequence

import numpy as np

from services.wire.batch import TrainingBatch


def random_batch(lengths: Sequence[int], prompt_length: int, top_k: int, vocab: int, seed: int = 0) -> TrainingBatch:
    """Completions of so many random tokens each, with random candidates of a teacher."""
    random, num_completions, num_tokens = np.random.default_rng(seed), len(lengths), sum(lengths)
    logprobs = np.log(random.dirichlet(np.ones(top_k + 1), num_tokens)).astype(np.float32)
    first = random.integers(0, vocab // top_k, (num_tokens, top_k), dtype=np.int32)
    return TrainingBatch(
        rows=np.arange(num_completions),
        groups=np.arange(num_completions),
        prompt_lengths=np.full(num_completions, prompt_length),
        completion_lengths=np.array(lengths, np.int64),
        truncated=np.zeros(num_completions, np.bool_),
        policy_versions=np.zeros(num_completions, np.int64),
        prompt_ids=random.integers(0, vocab, num_completions * prompt_length, dtype=np.int32),
        token_ids=random.integers(0, vocab, num_tokens, dtype=np.int32),
        rollout_logprobs=random.normal(-12.0, 0.1, num_tokens).astype(np.float32),
        teacher_token_logprobs=random.normal(-12.0, 1.0, num_tokens).astype(np.float32),
        support_ids=first + (vocab // top_k * np.arange(top_k)).astype(np.int32),
        teacher_support_logprobs=logprobs[:, :top_k],
        teacher_tail_logprob=logprobs[:, top_k],
    )
