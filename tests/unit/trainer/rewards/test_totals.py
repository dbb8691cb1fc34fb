"""Rewards of a step to totals, advantages and metrics, with numbers worked by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from services.config import LossConfig, RewardConfig
from services.errors import PeerError
from services.wire.batch import TrainingBatch, decode_batch, encode_batch
from tests.unit.trainer.samples import sample
from trainer.batch import collect, pack
from trainer.groups import PromptGroup
from trainer.rewards.totals import advantages, reward_metrics, total_rewards

NAN = float("nan")
TWO = {"functions": ["m:a", "m:b"]}


def batch_with(*groups: list[tuple[float | None, ...]], truncated: tuple[int, ...] = ()) -> TrainingBatch:
    """Groups at the places 10, 11, ... of a step, which others have left; a tuple a sample, with the rewards of a and b."""
    made, count = [], 0
    for place, rewards in enumerate(groups, 10):
        samples = []
        for of_sample in rewards:
            one = sample(count, 2, 1 + count % 3, "length" if count in truncated else "stop")
            samples.append(replace(one, rewards=of_sample))
            count += 1
        made.append(PromptGroup(place, samples[0].rollout.prompt, [], samples=samples))
    return decode_batch(encode_batch(collect(made, reward_names=["a", "b"])))


def test_totals_weigh_what_applies() -> None:
    rewards = np.array([[1.0, 2.0], [NAN, 2.0], [1.0, NAN], [NAN, NAN]])
    assert total_rewards(rewards, [1.0, 10.0]).tolist() == pytest.approx([21.0, 20.0, 1.0, NAN], nan_ok=True)
    # a function without weight is only measured: where it alone applies there is no reward
    assert total_rewards(rewards, [0.0, 10.0]).tolist() == pytest.approx([20.0, 20.0, NAN, NAN], nan_ok=True)


def test_advantages_are_compared_within_groups_whatever_their_places() -> None:
    batch = batch_with([(1.0, 0.0), (3.0, None)], [(5.0, None), (None, 0.0), (1.0, 0.0)], [(7.0, 1.0)])
    found = advantages(batch, RewardConfig(**TWO, advantage="leave_one_out"), "train")
    assert found.tolist() == pytest.approx([-2.0, 2.0, 4.5, -3.0, -1.5, 0.0])
    found = advantages(batch, RewardConfig(**TWO, advantage="group"), "train")
    assert found[:2].tolist() == pytest.approx([-1 / 1.0001, 1 / 1.0001]) and float(found[5]) == 0.0
    weighed = RewardConfig(**TWO, advantage="raw", weights=[2.0, 10.0])
    assert advantages(batch, weighed, "train").tolist() == [2.0, 6.0, 10.0, 0.0, 2.0, 24.0]


def test_a_completion_to_which_nothing_applies_is_compared_with_nobody() -> None:
    batch = batch_with([(1.0, 0.0), (None, None), (3.0, 0.0)], [(None, None), (None, None)])
    found = advantages(batch, RewardConfig(**TWO, advantage="leave_one_out"), "train")
    assert found.tolist() == [-2.0, 0.0, 2.0, 0.0, 0.0]
    assert advantages(batch, RewardConfig(**TWO, advantage="raw"), "train").tolist() == [1.0, 0.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("truncated", "expected"), [("train", [-4.0, -1.0, 5.0]), ("mask", [-4.0, -1.0, 5.0]), ("drop", [-2.0, 2.0, 0.0])]
)
def test_truncated_completions_count_in_their_group_unless_they_are_dropped(
    truncated: Any, expected: list[float]
) -> None:
    batch = batch_with([(1.0, 0.0), (3.0, 0.0), (7.0, 0.0)], truncated=(2,))
    found = advantages(batch, RewardConfig(**TWO, advantage="leave_one_out"), truncated)
    assert found.tolist() == pytest.approx(expected)


def test_every_micro_batch_has_the_advantages_of_its_samples_on_every_rank() -> None:
    batch = batch_with([(1.0, 0.0), (3.0, 0.0)], [(5.0, 0.0), (0.0, 0.0)], truncated=(1,))
    config = RewardConfig(**TWO, advantage="leave_one_out")
    expected = advantages(batch, config, "mask")

    seen = {}
    for rank in range(2):
        for part in pack(batch, LossConfig(truncated="mask"), 4, rank=rank, num_ranks=2, rewards=config):
            assert part.external_advantages is not None and len(part.external_advantages) == len(part.cu_seqlens) - 1
            seen |= dict(zip(part.samples.tolist(), part.external_advantages.tolist(), strict=True))
    assert seen == {index: float(expected[index]) for index in (0, 2, 3)}


def test_a_batch_of_other_functions_is_not_trained_on() -> None:
    batch = batch_with([(1.0, 0.0)])
    for functions in (["m:a"], ["m:b", "m:a"]):
        with pytest.raises(PeerError, match=r"holds rewards of \['a', 'b'\], but reward.functions are"):
            advantages(batch, RewardConfig(functions=functions), "train")
    with pytest.raises(PeerError, match="replay it with the functions"):
        advantages(replace(batch, rewards=None), RewardConfig(**TWO), "train")


def test_a_step_without_samples_has_no_advantages_and_no_metrics() -> None:
    empty = decode_batch(encode_batch(collect([], reward_names=["a", "b"])))
    assert advantages(empty, RewardConfig(**TWO), "train").shape == (0,)
    assert reward_metrics(empty, RewardConfig(**TWO)) == {}
    assert reward_metrics(collect([]), RewardConfig()) == {}


def test_metrics_are_of_what_applies() -> None:
    batch = batch_with([(1.0, None), (3.0, None)], [(2.0, None), (2.0, None)], [(None, None)])
    found = reward_metrics(batch, RewardConfig(**TWO, weights=[2.0, 1.0]))
    assert found == pytest.approx(
        {
            "reward_mean": 4.0,
            "reward_std": 2.0**0.5,
            "rewards/a_mean": 2.0,
            "rewards/a_std": 0.5**0.5,
            "reward_equal_groups_fraction": 0.5,
        }
    )


def test_rewards_travel_with_the_batch_and_a_batch_of_before_has_none() -> None:
    batch = batch_with([(1.0, None), (0.1, -3.0)])
    assert batch.rewards is not None and batch.rewards.dtype == np.float64
    assert np.array_equal(batch.rewards, [[1.0, NAN], [0.1, -3.0]], equal_nan=True)
    without = decode_batch(encode_batch(collect([])))
    assert without.rewards is None and without.reward_names == []
    for broken in (replace(batch, rewards=batch.rewards[:1]), replace(batch, reward_names=["a"])):
        with pytest.raises(PeerError, match="the batch holds rewards of shape"):
            decode_batch(encode_batch(broken))


def test_rewards_that_are_no_float64_numbers_stay_exact() -> None:
    batch = batch_with([(0.1, 1.0)])
    assert advantages(batch, RewardConfig(**TWO, advantage="raw"), "train").dtype == torch.float64
