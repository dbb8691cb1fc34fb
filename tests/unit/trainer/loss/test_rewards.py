"""Rewards in the loss against enumeration: the expected gradient is that of what is to be learned, and no estimate of it."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from services.config import LossConfig
from tests.unit.trainer.policies import (
    DECOMPOSED,
    F64,
    PURE_PG,
    assert_close,
    enumerate_sequences,
    exact,
    exact_kl,
    inputs_of,
    sequence_logprob,
)
from trainer.loss import minillm_loss, reward_advantages

SEQUENCES = enumerate_sequences(3, 3, end_token=2)
ALPHA, ALPHA_REWARD = 0.7, 1.9
# What is learned besides the rewards, and with which weight the reverse KL of the sequences is in it.
MIXED: dict[str, tuple[dict[str, Any], float]] = {
    "rewards alone": ({"rkl_advantage": False, "single_step_decomposition": False}, 0.0),
    "with the policy gradient": ({**PURE_PG, "alpha_rkl": ALPHA}, ALPHA),
    "with single-step, exclusive": ({**DECOMPOSED, "alpha_rkl": ALPHA, "alpha_single_step": ALPHA}, ALPHA),
}


class Game:
    """A student, a teacher, and a reward for each of all 15 sequences."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.logits, teacher = torch.randn(2, 7, 3, generator=generator, dtype=F64)
        self.logits.requires_grad_()
        self.teacher = teacher.log_softmax(-1)
        self.supports = self.teacher.argsort(-1, descending=True)[:, :1]
        self.rewards = 3 * torch.randn(len(SEQUENCES), generator=generator, dtype=F64)

    def probability(self, index: int) -> Tensor:
        return sequence_logprob(self.logits.log_softmax(-1), SEQUENCES[index]).exp()

    def loss(self, indices: list[int], advantages: Tensor, config: LossConfig) -> Tensor:
        """Of a batch of sequences, which share nothing but the step."""
        nodes = [node for index in indices for node in SEQUENCES[index][0]]
        tokens = [token for index in indices for token in SEQUENCES[index][1]]
        ends = [0, *itertools.accumulate(len(SEQUENCES[index][1]) for index in indices)]
        inputs = inputs_of(
            self.logits.log_softmax(-1)[nodes],
            self.teacher[nodes],
            torch.tensor(tokens),
            self.supports[nodes],
            cu_seqlens=ends,
            external_advantages=advantages,
        )
        return minillm_loss(inputs, config)[0]

    def objective(self, alpha: float) -> Tensor:
        """alpha KL(q || p) - alpha_reward E[R], of which the loss is to have the gradient."""
        expected = sum(self.probability(i) * self.rewards[i] for i in range(len(SEQUENCES)))
        return alpha * exact_kl(self.logits, self.teacher, SEQUENCES) - ALPHA_REWARD * expected

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.logits)[0]


@pytest.mark.parametrize("name", MIXED)
def test_raw_rewards_and_the_teacher_add_up_to_the_gradient_of_their_objective(name: str) -> None:
    options, alpha = MIXED[name]
    config, game = exact(alpha_reward=ALPHA_REWARD, **options), Game()
    total = torch.zeros((), dtype=F64)
    for index in range(len(SEQUENCES)):
        advantage = reward_advantages(game.rewards[index : index + 1], torch.tensor([0]), "raw")
        total = total + game.probability(index).detach() * game.loss([index], advantage, config)
    expected = game.gradient(game.objective(alpha))
    assert expected.abs().min() > 1e-4
    assert_close(game.gradient(total), expected, 1e-9)


@pytest.mark.parametrize("name", MIXED)
def test_leaving_one_out_of_every_pair_has_the_gradient_of_the_same_objective(name: str) -> None:
    options, alpha = MIXED[name]
    config, game = exact(alpha_reward=ALPHA_REWARD, **options), Game()
    total = torch.zeros((), dtype=F64)
    for pair in itertools.product(range(len(SEQUENCES)), repeat=2):
        advantages = reward_advantages(game.rewards[list(pair)], torch.tensor([0, 0]), "leave_one_out")
        probability = (game.probability(pair[0]) * game.probability(pair[1])).detach()
        total = total + probability * game.loss(list(pair), advantages, config)
    assert_close(game.gradient(total), game.gradient(game.objective(alpha)), 1e-9)


def test_a_sample_without_a_reward_leaves_the_teachers_part_alone() -> None:
    config, game = exact(alpha_reward=ALPHA_REWARD, **PURE_PG), Game()
    without = exact(alpha_reward=0.0, **PURE_PG)
    some, none = torch.tensor([5.0], dtype=F64), torch.zeros(1, dtype=F64)
    assert_close(game.gradient(game.loss([4], none, config)), game.gradient(game.loss([4], some, without)), 1e-12)
