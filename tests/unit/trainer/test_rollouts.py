"""What of a rollout server's answer is trained on, and what is set aside."""

from typing import Any

import numpy as np
import pytest

from services.config import SamplingConfig
from services.errors import PeerError
from services.wire.rollout import RolloutCompletion, RolloutSampling, VersionSpan
from tests.unit.trainer.generating import live
from trainer.data.prompts import Prompt
from trainer.groups import PromptGroup
from trainer.rollouts import completion_metrics, generate_groups, training_sampling

PROMPTS = [Prompt(row=7, token_ids=[1], text="a"), Prompt(row=7, token_ids=[2, 3], text="b")]


def completion(
    place: int, token_ids: list[int], logprobs: list[float], reason: Any = "stop", sample: int = 0
) -> RolloutCompletion:
    spans = [VersionSpan("0.1@run", 0, len(token_ids))]
    arrays = np.array(token_ids, np.int32), np.array(logprobs, np.float32)
    return RolloutCompletion(place, sample, *arrays, reason, spans)


class Client:
    def __init__(self, *completions: RolloutCompletion) -> None:
        self.completions, self.asked = list(completions), None

    async def generate(self, *asked: Any, on_completion: Any, **_: Any) -> list[RolloutCompletion]:
        self.asked = asked
        for completion in self.completions:
            on_completion(completion)
        return self.completions


def ignored(group: PromptGroup) -> None:
    pass


async def generate(client: Any, sampling: RolloutSampling, *sizes: int, on_group: Any = ignored) -> list[PromptGroup]:
    return await generate_groups(client, PROMPTS, sampling, live("0.1@run", "1.1@run"), *sizes, on_group=on_group)


GOOD = completion(0, [5, 6], [-1.0, -0.0])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (completion(1, [5], [-1.0], "abort"), "gave up on it"),
        (completion(1, [], []), "sent no token"),
        (completion(1, [5, 6], [-1.0]), "sent 1 logprobs for 2 tokens"),
        (completion(1, [5], [-1.0, -1.0]), "sent 2 logprobs for 1 tokens"),
        (completion(1, [5, 6], [-1.0, np.nan]), "gave a logprob that is not finite to a token it sampled"),
        (completion(1, [5, 6], [-1.0, -np.inf]), "gave a logprob that is not finite to a token it sampled"),
        (completion(1, [5, 6], [-1.0, 0.01]), "sent the logprob 0.01, which is no probability"),
    ],
)
async def test_a_bad_completion_costs_itself_alone(bad: RolloutCompletion, reason: str) -> None:
    client, sampling = Client(bad, GOOD), RolloutSampling(max_new_tokens=2)
    first, second = await generate(client, sampling)
    assert [(r.prompt, r.completion) for r in first.rollouts] == [(PROMPTS[0], GOOD)]
    assert client.asked == ([[1], [2, 3]], sampling, 1, 0)
    (item,) = second.quarantined
    # By its place: both prompts are the same row.
    assert (second.place, item.prompt, item.reason) == (1, PROMPTS[1], f"the rollout server {reason}")
    assert first.quarantined == [] and second.rollouts == []


async def test_what_rounding_puts_above_zero_is_a_probability() -> None:
    rounded = completion(1, [5], [5e-4])
    _, group = await generate(Client(GOOD, rounded), RolloutSampling(max_new_tokens=1))
    assert [r.completion for r in group.rollouts] == [rounded] and group.quarantined == []


async def test_the_server_is_asked_for_every_prompt_and_sample() -> None:
    completions = [completion(place, [5], [-1.0], sample=sample) for place in (0, 1) for sample in (2, 0, 1)]
    client, sampling = Client(*completions), RolloutSampling(max_new_tokens=2)
    groups = await generate(client, sampling, 3, 4)
    assert client.asked == ([[1], [2, 3]], sampling, 3, 4)
    assert [[r.completion.sample_index for r in group.rollouts] for group in groups] == [[0, 1, 2]] * 2
    assert groups[1].rollouts[0].sequence == [2, 3, 5]


async def test_a_group_is_handed_on_when_its_last_sample_has_arrived() -> None:
    order = [(1, 0), (0, 1), (1, 1), (0, 0)]
    client = Client(*(completion(place, [5], [-1.0], sample=sample) for place, sample in order))
    seen: list[tuple[int, int]] = []
    generate_one = client.generate

    async def watched(*asked: Any, on_completion: Any, **_: Any) -> list[RolloutCompletion]:
        def arrive(found: RolloutCompletion) -> None:
            seen.append((found.prompt_index, found.sample_index))
            on_completion(found)

        return await generate_one(*asked, on_completion=arrive)

    client.generate = watched  # type: ignore[method-assign]
    handed_on: list[tuple[int, int]] = []
    sampling = RolloutSampling(max_new_tokens=1)
    await generate(client, sampling, 2, on_group=lambda group: handed_on.append((group.place, len(seen))))
    assert handed_on == [(1, 3), (0, 4)]


async def test_a_rollout_is_as_old_as_its_oldest_token_and_of_this_run() -> None:
    mixed = completion(0, [5, 6], [-1.0, -1.0])
    mixed.policy_versions[:] = [VersionSpan("1.1@run", 0, 1), VersionSpan("0.1@run", 1, 2)]
    newer = completion(1, [5], [-1.0])
    newer.policy_versions[:] = [VersionSpan("1.1@run", 0, 1)]
    groups = await generate(Client(mixed, newer), RolloutSampling(max_new_tokens=2))
    assert [group.rollouts[0].policy_version for group in groups] == [0, 1]
    newer.policy_versions[:] = [VersionSpan("default", 0, 1)]
    with pytest.raises(PeerError, match="under the version 'default', which is none that the run"):
        await generate(Client(mixed, newer), RolloutSampling(max_new_tokens=2))


def test_the_sampling_of_training_is_the_configurations() -> None:
    config = SamplingConfig(max_new_tokens=9, temperature=0.5, top_p=0.75, top_k=6)
    assert training_sampling(config) == RolloutSampling(max_new_tokens=9, temperature=0.5, top_p=0.75, top_k=6)


async def test_how_completions_end_is_told_in_shares_of_all_of_them() -> None:
    answer = [
        completion(0, [5, 9], [-1.0] * 2),
        completion(0, [8], [-1.0], sample=1),
        completion(1, [5, 6, 7, 9], [-1.0] * 4),
        completion(1, [9] * 5, [-1.0] * 5, "length", sample=1),
    ]
    groups = await generate(Client(*answer), RolloutSampling(max_new_tokens=5), 2)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert completion_metrics(rollouts[1:2], str) == {
        "completion_tokens": 1.0,
        "truncated_fraction": 0.0,
        "ended_by_8_fraction": 1.0,
    }
    assert completion_metrics([], str) == {"completion_tokens": 0.0, "truncated_fraction": 0.0}
    assert completion_metrics(rollouts, lambda token: f"<{token}>") == {
        "completion_tokens": 3.0,
        "truncated_fraction": 0.25,
        "ended_by_<8>_fraction": 0.25,
        "ended_by_<9>_fraction": 0.5,
    }
