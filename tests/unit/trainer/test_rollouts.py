"""What is asked of the rollout servers, and which of their completions can be trained on."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from services.config import SamplingConfig
from services.errors import PeerError
from services.wire.rollout import RolloutCompletion, RolloutSampling, VersionSpan
from trainer.data.prompts import Prompt
from trainer.rollouts import completion_metrics, generate_rollouts, training_sampling

PROMPTS = [Prompt(11, [1, 2], ""), Prompt(12, [3], "")]
SAMPLING = RolloutSampling(max_new_tokens=3)


def completion(
    ids: list[int], logprobs: list[float], *, prompt: int = 0, sample: int = 0, reason: str = "stop"
) -> RolloutCompletion:
    tokens, spans = np.array(ids, np.int32), [VersionSpan("1.1@run", 0, len(ids))]
    return RolloutCompletion(prompt, sample, tokens, np.array(logprobs, np.float32), reason, spans)  # type: ignore[arg-type]


@dataclass
class Client:
    """A rollout client with a given answer."""

    answer: list[RolloutCompletion]
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    async def generate(self, *arguments: Any) -> list[RolloutCompletion]:
        self.asked.append(arguments)
        return self.answer


GOOD = completion([5, 6, 7], [-0.5, 0.0, -9.0])


async def test_completions_come_back_with_their_prompts_in_order() -> None:
    answer = [
        completion([ids], [-1.0], prompt=p, sample=s) for ids, (p, s) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)])
    ]
    client = Client(answer)
    rollouts = await generate_rollouts(client, PROMPTS, SAMPLING, 2, 7)  # type: ignore[arg-type]
    assert client.asked == [([[1, 2], [3]], SAMPLING, 2, 7)]
    assert [(r.prompt.row, r.completion.sample_index) for r in rollouts] == [(11, 0), (11, 1), (12, 0), (12, 1)]
    assert [r.sequence for r in rollouts] == [[1, 2, 0], [1, 2, 1], [3, 2], [3, 3]]


async def test_a_good_completion_is_kept_and_so_is_a_logprob_that_rounding_put_above_0() -> None:
    rounded = completion([5], [9e-4], prompt=1)
    client = Client([GOOD, rounded])
    assert [r.completion for r in await generate_rollouts(client, PROMPTS, SAMPLING)] == [GOOD, rounded]  # type: ignore[arg-type]


UNUSABLE = {
    "aborted": (completion([5, 6], [-1.0, -1.0], prompt=1, reason="abort"), "gave up on"),
    "empty": (completion([], [], prompt=1), "gave up on"),
    "a logprob short": (completion([5, 6], [-1.0], prompt=1), "sent 1 logprobs for 2 tokens"),
    "a logprob too many": (completion([5], [-1.0, -1.0], prompt=1), "sent 2 logprobs for 1 tokens"),
    "NaN": (completion([5, 6], [-1.0, np.nan], prompt=1), "not finite"),
    "minus infinity": (completion([5, 6], [-np.inf, -1.0], prompt=1), "not finite"),
    "above 0": (completion([5, 6], [-1.0, 0.0011], prompt=1), r"logprob 0\.0011, which is no probability"),
}


@pytest.mark.parametrize("fault", UNUSABLE)
async def test_a_completion_that_cannot_be_trained_on_is_refused_with_its_row(fault: str) -> None:
    bad, reason = UNUSABLE[fault]
    with pytest.raises(PeerError, match=rf"{reason}.*the prompt of row 12"):
        await generate_rollouts(Client([GOOD, bad]), PROMPTS, SAMPLING)  # type: ignore[arg-type]


def test_the_sampling_of_training_is_the_configurations() -> None:
    config = SamplingConfig(max_new_tokens=9, temperature=0.5, top_p=0.75, top_k=6)
    assert training_sampling(config) == RolloutSampling(max_new_tokens=9, temperature=0.5, top_p=0.75, top_k=6)


async def test_how_completions_end_is_told_in_shares_of_all_of_them() -> None:
    answer = [
        completion([5, 9], [-1.0] * 2),
        completion([8], [-1.0]),
        completion([5, 6, 7, 9], [-1.0] * 4, prompt=1),
        completion([9] * 5, [-1.0] * 5, prompt=1, reason="length"),
    ]
    rollouts = await generate_rollouts(Client(answer), PROMPTS, SAMPLING)  # type: ignore[arg-type]
    assert completion_metrics(rollouts, lambda token: f"<{token}>") == {
        "completion_tokens": 3.0,
        "truncated_fraction": 0.25,
        "ended_by_<8>_fraction": 0.25,
        "ended_by_<9>_fraction": 0.5,
    }
