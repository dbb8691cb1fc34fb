"""Rollouts that a scripted teacher finds likely."""

import numpy as np

from services.wire.rollout import RolloutCompletion, VersionSpan
from tests.scripted_teacher import logprobs_of
from trainer.data.prompts import Prompt
from trainer.groups import Rollout

LENGTH = 6


def rollout(index: int) -> Rollout:
    """A student not far from its teacher: each token is the teacher's second choice."""
    ids = [1, 2, index]
    for _ in range(LENGTH):
        ids.append(int(np.argsort(logprobs_of([*ids, 0], len(ids), 1.0)[0])[-2]))
    spans = [VersionSpan("0", 0, LENGTH)]
    token_ids = np.array(ids[3:], np.int32)
    completion = RolloutCompletion(index, 0, token_ids, np.zeros(LENGTH, np.float32), "stop", spans)
    return Rollout(Prompt(index + 1, ids[:3], ""), completion, 0)


ROLLOUTS = [rollout(index) for index in range(20)]
