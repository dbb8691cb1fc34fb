"""Prompts to completions: what the rollout servers are asked, and what of their answers is trained on.

consumes   Prompt
produces   Rollout: a completion with the logprobs of the policy that sampled it; or a quarantined one with a reason
waits for  the rollout servers; a server that is paused for a weight push answers after its resume
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from services.clients import RolloutClient
from services.config import SamplingConfig
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


@dataclass(frozen=True)
class Quarantined:
    """A completion that is set aside: what is known of it cannot be trained on."""

    rollout: Rollout
    reason: str


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
) -> tuple[list[Rollout], list[Quarantined]]:
    """Complete every prompt; both lists are ordered by prompt, then sample.

    Args:
        student_top_k: also return the student's k likeliest tokens at every position.

    Raises:
        PeerError: a server failed.
    """
    completions = await client.generate([p.token_ids for p in prompts], sampling, samples_per_prompt, student_top_k)
    rollouts = [Rollout(prompts[c.prompt_index], c) for c in completions]
    reasons = [reason_to_set_aside(completion) for completion in completions]
    found = list(zip(rollouts, reasons, strict=True))
    good = [rollout for rollout, reason in found if reason is None]
    return good, [Quarantined(rollout, f"the rollout server {reason}") for rollout, reason in found if reason]


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


def reason_to_set_aside(completion: RolloutCompletion) -> str | None:
    """What a rollout server has done wrong with a completion, or None."""
    logprobs = completion.rollout_logprobs
    if completion.finish_reason == "abort":
        return "gave up on it"
    if len(completion.token_ids) == 0:
        return "sent no token"
    if len(logprobs) != len(completion.token_ids):
        return f"sent {len(logprobs)} logprobs for {len(completion.token_ids)} tokens"
    if not np.isfinite(logprobs).all():
        return "gave a logprob that is not finite to a token it sampled"
    if logprobs.max() > _LOGPROB_TOLERANCE:
        return f"sent the logprob {logprobs.max():.4g}, which is no probability"
    return None
