"""Prompts to completions: what the rollout servers are asked, and what of their answers is trained on.

consumes   Prompt
produces   Rollout: a completion with the logprobs of the policy that sampled it
waits for  the rollout servers; a server that is paused for a weight push answers after its resume
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from services.clients import RolloutClient
from services.config import SamplingConfig
from services.errors import PeerError
from services.wire.rollout import RolloutCompletion, RolloutSampling
from trainer.data.prompts import Prompt

# What rounding can put a logprob above 0.
_LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Rollout:
    prompt: Prompt
    completion: RolloutCompletion

    @property
    def sequence(self) -> list[int]:
        """Token ids of prompt and completion."""
        return [*self.prompt.token_ids, *self.completion.token_ids.tolist()]


def training_sampling(config: SamplingConfig) -> RolloutSampling:
    """The sampling of training, as the rollout server takes it."""
    return RolloutSampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
    )


async def generate_rollouts(
    client: RolloutClient,
    prompts: list[Prompt],
    sampling: RolloutSampling,
    samples_per_prompt: int = 1,
    student_top_k: int = 0,
) -> list[Rollout]:
    """Complete every prompt; ordered by prompt, then sample.

    Args:
        student_top_k: also return the student's k likeliest tokens at every position.

    Raises:
        PeerError: a server failed, or ended a completion for a reason of its own.
    """
    completions = await client.generate([p.token_ids for p in prompts], sampling, samples_per_prompt, student_top_k)
    for completion in completions:
        if completion.finish_reason == "abort" or len(completion.token_ids) == 0:
            raise PeerError(f"the rollout server gave up on the prompt of row {prompts[completion.prompt_index].row}")
        if (reason := _logprob_defect(completion)) is not None:
            raise PeerError(
                f"the rollout server {reason}, for the prompt of row {prompts[completion.prompt_index].row}"
            )
    return [Rollout(prompts[c.prompt_index], c) for c in completions]


def completion_metrics(rollouts: list[Rollout], spell: Callable[[int], str]) -> dict[str, float]:
    """How completions end: their mean length in tokens, the share cut off at max_new_tokens, the share of each end token.

    Args:
        spell: a token as text, for the names of the shares.
    """
    completions, count = [r.completion for r in rollouts], len(rollouts)
    ends = Counter(int(c.token_ids[-1]) for c in completions if not c.truncated)
    return {
        "completion_tokens": sum(len(c.token_ids) for c in completions) / count,
        "truncated_fraction": sum(c.truncated for c in completions) / count,
        **{f"ended_by_{spell(token)}_fraction": ended / count for token, ended in sorted(ends.items())},
    }


def _logprob_defect(completion: RolloutCompletion) -> str | None:
    """Why the importance weights of a completion would be wrong, or None."""
    logprobs = completion.rollout_logprobs
    if len(logprobs) != len(completion.token_ids):
        return f"sent {len(logprobs)} logprobs for {len(completion.token_ids)} tokens"
    if not np.isfinite(logprobs).all():
        return "gave a logprob that is not finite to a token it sampled"
    if logprobs.max() > _LOGPROB_TOLERANCE:
        return f"sent the logprob {logprobs.max():.4g}, which is no probability"
    return None
