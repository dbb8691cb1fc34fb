"""The KL to a reference, the entropy bonus, and the tokens that a policy gradient looks at."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.config import LossConfig
from tests.unit.trainer.policies import F64, assert_close, exact, inputs_of, random_batch
from trainer.loss import merge_metrics, minillm_loss
from trainer.loss.reference import reference_kl

NOTHING_ELSE = {"rkl_advantage": False, "alpha_single_step": 0.0}


def gradient(batch, config: LossConfig) -> Tensor:  # type: ignore[no-untyped-def]
    leaf = batch.student_token_logprobs.detach().requires_grad_()
    (found,) = torch.autograd.grad(minillm_loss(replace(batch, student_token_logprobs=leaf), config)[0], leaf)
    return found


def test_the_reference_kl_is_schulmans_k3_with_its_gradient() -> None:
    student = torch.tensor([-1.0, -2.0, -0.5], dtype=F64, requires_grad=True)
    reference = torch.tensor([-1.0, -1.5, -3.0], dtype=F64)
    ratios = [0.0, 0.5, -2.5]
    found = reference_kl(student, reference)
    assert_close(found, [math.exp(x) - 1 - x for x in ratios], 1e-14)
    assert_close(torch.autograd.grad(found.sum(), student)[0], [1 - math.exp(x) for x in ratios], 1e-14)


def test_policies_that_have_nothing_in_common_have_a_finite_distance() -> None:
    student = torch.tensor([-200.0], requires_grad=True)
    found = reference_kl(student, torch.tensor([0.0]))
    assert found.isfinite().all() and torch.autograd.grad(found.sum(), student)[0].isfinite().all()


def test_in_expectation_over_sampled_tokens_it_is_the_reverse_kl_to_the_reference() -> None:
    student, reference = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=F64).log_softmax(-1)
    found = (student.exp() * reference_kl(student, reference)).sum()
    assert_close(found, (student.exp() * (student - reference)).sum(), 1e-12)


def test_weight_of_the_reference_counts_once_for_every_trained_token_and_is_measured() -> None:
    batch = random_batch(2)
    reference = torch.where(batch.loss_mask, batch.student_token_logprobs.detach() + 0.3, math.nan)
    batch = replace(batch, reference_token_logprobs=reference)
    config = exact(alpha_reference_kl=0.4, **NOTHING_ELSE)
    assert_close(gradient(batch, config), batch.loss_mask.double() * (0.4 * (1 - math.exp(0.3)) / 5), 1e-12)
    loss, metrics = minillm_loss(batch, config)
    k3 = math.exp(0.3) - 1.3
    assert_close(loss, 0.4 * k3 * int(batch.loss_mask.sum()) / 5, 1e-12)
    assert merge_metrics([metrics])["reference_kl"] == pytest.approx(k3)


def test_importance_does_not_weigh_the_reference_and_several_updates_keep_it() -> None:
    batch = random_batch(2, several_updates=True)
    batch = replace(batch, reference_token_logprobs=batch.student_token_logprobs.detach() + 0.3)
    config = exact(alpha_reference_kl=0.4, **NOTHING_ELSE | {"importance_sampling": "tis"})
    assert_close(gradient(batch, config), batch.loss_mask.double() * (0.4 * (1 - math.exp(0.3)) / 5), 1e-12)


def test_the_entropy_bonus_raises_the_entropy_of_trained_tokens_alone() -> None:
    batch = random_batch(3)
    entropies = torch.where(batch.loss_mask, 1.5, math.nan).double().requires_grad_()
    loss, metrics = minillm_loss(replace(batch, student_entropies=entropies), exact(alpha_entropy=0.2, **NOTHING_ELSE))
    assert_close(loss, -0.2 * 1.5 * int(batch.loss_mask.sum()) / 5, 1e-12)
    assert_close(torch.autograd.grad(loss, entropies)[0], batch.loss_mask.double() * (-0.2 / 5), 1e-12)
    assert merge_metrics([metrics])["student_entropy"] == pytest.approx(1.5)


def test_only_the_policy_gradient_leaves_out_tokens_of_low_entropy() -> None:
    batch = random_batch(4, with_rewards=True)
    chosen = torch.arange(len(batch.token_ids)) % 2 == 0
    masked = replace(batch, policy_gradient_mask=chosen)
    policy_gradient = exact(single_step_decomposition=False)
    whole = gradient(batch, policy_gradient)
    assert (whole[batch.loss_mask] != 0).all()
    assert_close(gradient(masked, policy_gradient), torch.where(chosen, whole, 0.0), 1e-14)
    single_step = exact(rkl_advantage=False, alpha_reward=0.0)
    assert_close(gradient(masked, single_step), gradient(batch, single_step), 1e-14)


def test_the_mask_of_high_entropy_holds_for_later_updates_too() -> None:
    batch = random_batch(4, several_updates=True, with_rewards=True)
    chosen = torch.arange(len(batch.token_ids)) % 2 == 0
    config = exact(single_step_decomposition=False, importance_sampling="tis")
    got = gradient(replace(batch, policy_gradient_mask=chosen), config)
    assert_close(got, torch.where(chosen, gradient(batch, config), 0.0), 1e-14)


def test_without_weights_neither_is_needed() -> None:
    logits = torch.zeros(2, 3, dtype=F64).log_softmax(-1)
    tokens = torch.zeros(2, dtype=torch.int64)
    _, metrics = minillm_loss(inputs_of(logits, logits, tokens, tokens[:, None]), LossConfig())
    assert "reference_kl" not in merge_metrics([metrics])
