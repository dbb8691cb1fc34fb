"""What of a rollout server's answer is trained on, and what is set aside."""

from typing import Any

import numpy as np
import pytest

from services.config import SamplingConfig
from services.wire.rollout import RolloutCompletion, RolloutSampling, VersionSpan
from trainer.data.prompts import Prompt
from trainer.rollouts import completion_metrics, generate_rollouts, training_sampling

PROMPTS = [Prompt(row=7, token_ids=[1], text="a"), Prompt(row=7, token_ids=[2, 3], text="b")]


def completion(place: int, token_ids: list[int], logprobs: list[float], reason: Any = "stop") -> RolloutCompletion:
    spans = [VersionSpan("0.1@run", 0, len(token_ids))]
    arrays = np.array(token_ids, np.int32), np.array(logprobs, np.float32)
    return RolloutCompletion(place, 0, *arrays, reason, spans)


class Client:
    def __init__(self, *completions: RolloutCompletion) -> None:
        self.completions, self.asked = list(completions), None

    async def generate(self, *asked: Any) -> list[RolloutCompletion]:
        self.asked = asked
        return self.completions


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
    rollouts, quarantined = await generate_rollouts(Client(GOOD, bad), PROMPTS, RolloutSampling(max_new_tokens=2))  # type: ignore[arg-type]
    assert [(r.prompt, r.completion) for r in rollouts] == [(PROMPTS[0], GOOD)]
    (item,) = quarantined
    # By its place: both prompts are the same row.
    assert (item.rollout.prompt, item.reason) == (PROMPTS[1], f"the rollout server {reason}")


async def test_what_rounding_puts_above_zero_is_a_probability() -> None:
    rounded = completion(1, [5], [5e-4])
    rollouts, quarantined = await generate_rollouts(Client(rounded), PROMPTS, RolloutSampling(max_new_tokens=1))  # type: ignore[arg-type]
    assert [r.completion for r in rollouts] == [rounded] and quarantined == []


async def test_the_server_is_asked_for_every_prompt_and_sample() -> None:
    client, sampling = Client(GOOD), RolloutSampling(max_new_tokens=2)
    await generate_rollouts(client, PROMPTS, sampling, 3, 4)  # type: ignore[arg-type]
    assert client.asked == ([[1], [2, 3]], sampling, 3, 4)
    (rollout,) = (await generate_rollouts(client, PROMPTS, sampling))[0]  # type: ignore[arg-type]
    assert rollout.sequence == [1, 5, 6]


def test_the_sampling_of_training_is_the_configurations() -> None:
    config = SamplingConfig(max_new_tokens=9, temperature=0.5, top_p=0.75, top_k=6)
    assert training_sampling(config) == RolloutSampling(max_new_tokens=9, temperature=0.5, top_p=0.75, top_k=6)


async def test_how_completions_end_is_told_in_shares_of_all_of_them() -> None:
    answer = [
        completion(0, [5, 9], [-1.0] * 2),
        completion(0, [8], [-1.0]),
        completion(1, [5, 6, 7, 9], [-1.0] * 4),
        completion(1, [9] * 5, [-1.0] * 5, "length"),
    ]
    rollouts, _ = await generate_rollouts(Client(*answer), PROMPTS, RolloutSampling(max_new_tokens=5))  # type: ignore[arg-type]
    assert completion_metrics(rollouts, lambda token: f"<{token}>") == {
        "completion_tokens": 3.0,
        "truncated_fraction": 0.25,
        "ended_by_<8>_fraction": 0.25,
        "ended_by_<9>_fraction": 0.5,
    }
