"""Rewards to advantages (oracle 8), and rewards from outside."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.config import LossConfig
from tests.unit.trainer.policies import (
    F64,
    assert_close,
    enumerate_sequences,
    exact,
    inputs_of,
    random_batch,
    sequence_logprob,
)
from trainer.loss import minillm_loss, reward_advantages, reward_to_go

# --- section 2 and oracle 8: reward to go ---


def naive_reward_to_go(rewards: list, mask: list, cu: list, gamma: float, normalize: bool, exclusive: bool) -> list:
    """The recurrence of the specification, one position at a time; 0 at masked positions."""
    result = [0.0] * len(rewards)
    for start, end in itertools.pairwise(cu):
        num = den = following = 0.0
        for t in reversed(range(start, end)):
            num = mask[t] * rewards[t] + gamma ** mask[t] * num
            den = mask[t] + gamma ** mask[t] * den
            if mask[t]:
                inclusive = num / den if normalize else num
                result[t] = gamma * following if exclusive else inclusive
                following = inclusive
    return result


@settings(max_examples=150, deadline=None)
@given(
    sequences=st.lists(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 1)), max_size=9), max_size=5),
    gamma=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    normalize=st.booleans(),
    exclusive=st.booleans(),
)
def test_reward_to_go_equals_the_recurrence(
    sequences: list[list[tuple[float, int]]], gamma: float, normalize: bool, exclusive: bool
) -> None:
    rewards = [r for s in sequences for r, _ in s]
    mask = [m for s in sequences for _, m in s]
    cu = [0, *itertools.accumulate(map(len, sequences))]
    got = reward_to_go(
        torch.tensor([r if m else math.nan for r, m in zip(rewards, mask, strict=True)], dtype=F64),
        torch.tensor(mask),
        torch.tensor(cu),
        gamma,
        normalize,
        exclusive,
    )
    assert got.tolist() == pytest.approx(naive_reward_to_go(rewards, mask, cu, gamma, normalize, exclusive), abs=1e-12)


def ones_to_go(num_tokens: int, gamma: float, **options: bool) -> Tensor:
    ones = torch.ones(num_tokens)
    options = {"length_normalization": False, "exclusive": False, **options}
    return reward_to_go(ones, ones.bool(), torch.tensor([0, num_tokens]), gamma, **options)


def test_reward_to_go_of_constant_rewards() -> None:
    assert ones_to_go(6, 0.5).tolist() == [1.96875, 1.9375, 1.875, 1.75, 1.5, 1.0]
    assert ones_to_go(6, 0.5, exclusive=True).tolist() == [0.96875, 0.9375, 0.875, 0.75, 0.5, 0.0]
    assert ones_to_go(6, 1.0).tolist() == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert ones_to_go(6, 0.0).tolist() == [1.0] * 6
    assert ones_to_go(6, 0.0, exclusive=True).tolist() == [0.0] * 6
    assert ones_to_go(6, 1.0, length_normalization=True).tolist() == [1.0] * 6


@pytest.mark.parametrize("length_normalization", [False, True])
def test_reward_to_go_of_a_long_completion_is_finite_and_right(length_normalization: bool) -> None:
    got = ones_to_go(4096, 0.9, length_normalization=length_normalization)
    assert_close(got[0], 1.0 if length_normalization else 10.0, 1e-5)
    assert_close(got[-1], 1.0)
    assert got.isfinite().all()


# --- rewards besides the teacher ---

REWARDS, GROUPS = torch.tensor([1.0, 0.0, 5.0, 3.0, 0.0], dtype=F64), torch.tensor([1, 0, 0, 1, 3])


def test_group_advantages_are_centred_and_scaled_within_a_prompt() -> None:
    # Group 1 holds 1 and 3: mean 2, deviation 1. Group 0 holds 0 and 5: mean 2.5, deviation 2.5. Group 3 stands alone.
    got = reward_advantages(REWARDS, GROUPS, "group")
    assert_close(got, [-1 / 1.0001, -2.5 / 2.5001, 2.5 / 2.5001, 1 / 1.0001, 0.0])


def test_leave_one_out_advantages_compare_with_the_others() -> None:
    assert_close(reward_advantages(REWARDS, GROUPS, "leave_one_out"), [-2.0, -5.0, 5.0, 2.0, 0.0])


def test_raw_advantages_are_the_rewards_and_equal_rewards_of_a_group_teach_nothing() -> None:
    assert_close(reward_advantages(REWARDS, GROUPS, "raw"), REWARDS)
    equal = reward_advantages(torch.ones(4, dtype=F64), torch.zeros(4, dtype=torch.int64), "group")
    assert_close(equal, [0.0] * 4)


def test_external_advantage_adds_to_every_trained_token_of_its_sequence() -> None:
    batch = random_batch(1)
    external = torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0], dtype=F64)
    leaf = batch.student_token_logprobs.detach().requires_grad_()
    config = exact(single_step_decomposition=False, alpha_reward=3.0, alpha_rkl=0.7)
    gradients = [
        torch.autograd.grad(
            minillm_loss(replace(batch, student_token_logprobs=leaf, external_advantages=x), config)[0], leaf
        )[0]
        for x in (external, torch.zeros(5, dtype=F64))
    ]
    of_position = external.repeat_interleave(batch.cu_seqlens.diff())
    assert_close(gradients[0] - gradients[1], -3.0 * of_position * batch.loss_mask / 5)


def test_reward_alone_follows_the_policy_gradient_of_its_expectation() -> None:
    """Enumerated: with the rewards of whole sequences as raw advantages, the gradient is that of minus their mean."""
    generator = torch.Generator().manual_seed(3)
    sequences = enumerate_sequences(3, 3, end_token=2)
    logits, teacher = torch.randn(2, 7, 3, generator=generator, dtype=F64)
    logits.requires_grad_()
    rewards = torch.randn(len(sequences), generator=generator, dtype=F64)
    config = exact(rkl_advantage=False, single_step_decomposition=False)
    total = objective = torch.zeros((), dtype=F64)
    for reward, (nodes, tokens) in zip(rewards, sequences, strict=True):
        inputs = inputs_of(
            logits.log_softmax(-1)[nodes],
            teacher.log_softmax(-1)[nodes],
            torch.tensor(tokens),
            torch.zeros(len(tokens), 1, dtype=torch.int64),
            external_advantages=reward[None],
        )
        probability = sequence_logprob(logits.log_softmax(-1), (nodes, tokens)).exp()
        total = total + probability.detach() * minillm_loss(inputs, config)[0]
        objective = objective - probability * reward
    got, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (total, objective))
    assert_close(got, wanted)


def advantages(config: LossConfig, log_ratios: list[float], external: float | None = None) -> Tensor:
    """Minus the gradient of each token's loss by its log-probability, on policy."""
    student = torch.full((len(log_ratios), 4), 0.25, dtype=F64).log()
    zeros = torch.zeros(len(log_ratios), dtype=torch.int64)
    inputs = inputs_of(student, student, zeros, zeros[:, None] + 1)
    leaf = inputs.student_token_logprobs.requires_grad_()
    inputs = replace(
        inputs,
        student_token_logprobs=leaf,
        teacher_token_logprobs=leaf.detach() + torch.tensor(log_ratios, dtype=F64),
        external_advantages=None if external is None else torch.tensor([external], dtype=F64),
    )
    return -torch.autograd.grad(minillm_loss(inputs, config)[0], leaf)[0]


def test_without_a_clip_nothing_is_clipped_and_with_one_the_total_is() -> None:
    free = exact(single_step_decomposition=False)
    assert_close(advantages(free, [20.0, -30.0]), [20.0, -30.0])
    clipped = LossConfig(single_step_decomposition=False, aggregation="sequence_sum")
    assert_close(advantages(clipped, [20.0, -30.0, 3.0]), [10.0, -10.0, 3.0])
    assert_close(advantages(clipped, [4.0, -4.0, 4.0], external=8.0), [10.0, 4.0, 10.0])


def test_a_single_step_term_without_weight_leaves_the_tokens_own_reward_in() -> None:
    assert_close(advantages(exact(alpha_single_step=0.0), [2.0, 1.0]), [2.0, 1.0])


def test_rewards_of_zeros_and_ones_may_be_integers_or_booleans() -> None:
    expected = reward_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), "group")
    for rewards in (torch.tensor([1, 0]), torch.tensor([True, False])):
        assert_close(reward_advantages(rewards, torch.tensor([0, 0]), "group"), expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
def test_long_packed_sequences_equal_the_recurrence(normalize: bool, exclusive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [300, 1, 517, 64]
    rewards = torch.randn(sum(lengths), generator=generator, dtype=F64)
    mask = torch.rand(sum(lengths), generator=generator) > 0.2
    cu = [0, *itertools.accumulate(lengths)]
    got = reward_to_go(rewards, mask, torch.tensor(cu), 0.97, normalize, exclusive)
    wanted = naive_reward_to_go(rewards.tolist(), mask.long().tolist(), cu, 0.97, normalize, exclusive)
    assert_close(got, wanted)
