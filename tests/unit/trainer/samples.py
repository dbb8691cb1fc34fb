"""Scored samples with random columns, each unlike every other, for tests of batches and losses."""

from collections.abc import Sequence

import numpy as np

from services.wire.batch import TrainingBatch
from services.wire.rollout import RolloutCompletion, VersionSpan
from trainer.batch import collect
from trainer.data.prompts import Prompt
from trainer.groups import PromptGroup, Rollout, ScoredSample

VOCAB, TOP_K = 261, 4


def sample(seed: int, prompt_length: int, length: int, finish_reason: str = "stop") -> ScoredSample:
    random = np.random.default_rng(seed)
    logprobs = np.log(random.dirichlet(np.ones(TOP_K + 1), length)).astype(np.float32)
    completion = RolloutCompletion(
        prompt_index=0,
        sample_index=0,
        token_ids=random.integers(0, VOCAB, length).astype(np.int32),
        rollout_logprobs=random.normal(-3, 0.1, length).astype(np.float32),
        finish_reason=finish_reason,  # type: ignore[arg-type]
        policy_versions=[VersionSpan("0", 0, length)],
    )
    support_ids = np.stack([random.permutation(VOCAB)[:TOP_K] for _ in range(length)]).astype(np.int32)
    same = support_ids == completion.token_ids[:, None]
    outside = logprobs.min(-1) - random.exponential(1.0, length)  # a part of the tail, below the candidates
    prompt = Prompt(seed, random.integers(0, VOCAB, prompt_length).tolist(), "")
    return ScoredSample(
        Rollout(prompt, completion, 0),
        teacher_token_logprobs=np.where(same.any(-1), np.where(same, logprobs[:, :TOP_K], 0).sum(-1), outside).astype(
            np.float32
        ),
        support_ids=support_ids,
        teacher_support_logprobs=logprobs[:, :TOP_K],
        teacher_tail_logprob=logprobs[:, TOP_K],
    )


def batch_of(samples: list[ScoredSample], windows: Sequence[list[int]] = ()) -> TrainingBatch:
    """A batch of groups of one sample each, with windows of text."""
    rollouts = [sample.rollout for sample in samples]
    groups = [PromptGroup(place, r.prompt, [r], [samples[place]]) for place, r in enumerate(rollouts)]
    return collect(groups, windows=windows)


SAMPLES = [sample(i, prompt, length) for i, (prompt, length) in enumerate([(3, 5), (1, 1), (7, 2), (2, 9), (4, 4)])]
BATCH = batch_of(SAMPLES)
