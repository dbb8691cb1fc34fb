"""Prompts to completions: what the rollout servers are asked, and what of their answers is trained on.

consumes   Prompt
produces   PromptGroup: completions with the logprobs of the policy that sampled them; or quarantined ones with a reason
waits for  the rollout servers; a server that is paused for a weight push answers after its resume
"""

from collections import Counter
from collections.abc import Callable

import numpy as np

from services.clients import RolloutClient
from services.config import SamplingConfig
from services.process.waiting import waiting_for
from services.wire.rollout import RolloutCompletion, RolloutSampling
from trainer.data.prompts import Prompt
from trainer.groups import PromptGroup, Quarantined, Rollout
from trainer.weights.policy_versions import PolicyVersions

# What rounding can put a logprob above 0.
_LOGPROB_TOLERANCE = 1e-3


def training_sampling(config: SamplingConfig) -> RolloutSampling:
    """The sampling of training, as the rollout server takes it."""
    return RolloutSampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
    )


async def generate_groups(
    client: RolloutClient,
    prompts: list[Prompt],
    sampling: RolloutSampling,
    versions: PolicyVersions,
    samples_per_prompt: int = 1,
    student_top_k: int = 0,
    on_group: Callable[[PromptGroup], None] = lambda group: None,
    *,
    waits_for_weights: bool = False,
) -> list[PromptGroup]:
    """Complete every prompt.

    Args:
        versions: those that this run has pushed.
        student_top_k: also return the student's k likeliest tokens at every position.
        on_group: called with each group as soon as its last sample has arrived.
        waits_for_weights: whether somebody else will push the weights, should all servers have been started again.

    Returns:
        One group a prompt, in their order.

    Raises:
        PeerError: servers failed, or sampled under a version that is none of the run's. A WeightsWantedError is one.
    """
    arrived: dict[int, list[RolloutCompletion]] = {place: [] for place in range(len(prompts))}
    groups: dict[int, PromptGroup] = {}

    num_arrived, num_asked = 0, len(prompts) * samples_per_prompt

    def arrive(completion: RolloutCompletion) -> None:
        nonlocal num_arrived
        num_arrived += 1
        wait.alive(f"{num_arrived} of {num_asked} have come")
        place = completion.prompt_index
        arrived[place].append(completion)
        if len(arrived[place]) == samples_per_prompt:
            completions = sorted(arrived.pop(place), key=lambda c: c.sample_index)
            groups[place] = _group(place, prompts[place], completions, versions)
            on_group(groups[place])

    ids = [prompt.token_ids for prompt in prompts]
    with waiting_for("completions of the rollout servers", "completions") as wait:
        await client.generate(
            *(ids, sampling, samples_per_prompt, student_top_k),
            on_completion=arrive,
            waits_for_weights=waits_for_weights,
        )
    return [groups[place] for place in range(len(prompts))]


def _group(place: int, prompt: Prompt, completions: list[RolloutCompletion], versions: PolicyVersions) -> PromptGroup:
    group = PromptGroup(place, prompt, [])
    for completion in completions:
        if reason := reason_to_set_aside(completion):
            group.quarantined.append(Quarantined(prompt, completion, f"the rollout server {reason}"))
        else:
            group.rollouts.append(Rollout(prompt, completion, versions.oldest([completion])))
    return group


def completion_metrics(rollouts: list[Rollout], spell: Callable[[int], str]) -> dict[str, float]:
    """How completions end: their mean length in tokens, the share cut off at max_new_tokens, the share of each end token.

    Args:
        spell: a token as text, for the names of the shares.
    """
    completions, count = [r.completion for r in rollouts], max(1, len(rollouts))
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
