"""Token losses to one number: weights of tokens, totals over a step, metrics."""

import math
from dataclasses import replace

import pytest
import torch

from services.config import LossConfig
from tests.unit.trainer.policies import F64, assert_close, inputs_of, random_batch, take
from trainer.loss.minillm import LossTotals, language_model_loss, merge_metrics, minillm_loss

# --- section 5: aggregation, totals, metrics ---


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 5] * 5),
        ("sequence_mean", [1 / 8] * 4 + [1 / 2]),
        ("sequence_sum", [1 / 2] * 5),
        ("constant", [1 / 20] * 5),
    ],
)
def test_aggregation_weighs_tokens(aggregation: str, expected: list[float]) -> None:
    """Sequences of 4 and 1 trained tokens, and one of none that counts nowhere; max_completion_length 10."""
    student, teacher = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=F64).log_softmax(-1)
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 0])
    inputs = inputs_of(student, teacher, torch.zeros(7, dtype=torch.int64), torch.zeros(7, 1, dtype=torch.int64))
    kl = torch.zeros(7, dtype=F64, requires_grad=True)
    inputs = replace(inputs, loss_mask=mask, cu_seqlens=torch.tensor([0, 4, 5, 7]), single_step_kl=kl)
    totals = LossTotals.of(mask, inputs.cu_seqlens, max_completion_length=10)
    assert totals == LossTotals(num_valid_tokens=5, num_sequences=2, max_completion_length=10)
    loss, _ = minillm_loss(inputs, LossConfig(rkl_advantage=False, aggregation=aggregation), totals)
    assert_close(torch.autograd.grad(loss, kl)[0], [*expected, 0.0, 0.0])


def test_constant_aggregation_asks_for_the_completion_length() -> None:
    with pytest.raises(ValueError, match="max_completion_length"):
        minillm_loss(random_batch(0), LossConfig(aggregation="constant"))


def test_totals_of_one_step_must_agree_on_the_completion_length() -> None:
    assert LossTotals.sum([LossTotals(3, 1, 8), LossTotals(4, 2, 8)]) == LossTotals(7, 3, 8)
    with pytest.raises(ValueError, match="max_completion_length"):
        LossTotals.sum([LossTotals(3, 1, 8), LossTotals(4, 2, 16)])


def test_input_of_wrong_shape_is_named() -> None:
    batch = random_batch(0)
    with pytest.raises(AssertionError, match="teacher_tail_logprob"):
        replace(batch, teacher_tail_logprob=batch.teacher_tail_logprob[:, None])


def test_metrics_are_means_over_trained_tokens() -> None:
    batch = random_batch(2)
    config = LossConfig(single_step_decomposition=False, gamma=0.0, advantage_clip=1.0)
    got = merge_metrics([minillm_loss(take(batch, part)[0], config)[1] for part in ([0, 1], [2, 3, 4])])
    mask = batch.loss_mask
    log_ratio = (batch.student_token_logprobs - batch.teacher_token_logprobs)[mask]
    advantages = (-log_ratio).clamp(-1, 1)
    w = (batch.student_token_logprobs - batch.rollout_logprobs)[mask].exp()
    real = (batch.support_ids >= 0)[mask].to(F64)
    hits = [y in row for y, row in zip(batch.token_ids[mask].tolist(), batch.support_ids[mask].tolist(), strict=True)]
    expected = {
        "num_valid_tokens": mask.sum(),
        "num_sequences": 5,
        "reverse_kl_k1": log_ratio.mean(),
        "reverse_kl_k3": ((-log_ratio).exp() - 1 + log_ratio).mean(),
        "student_entropy": batch.student_entropies[mask].mean(),
        "teacher_support_mass": (batch.teacher_support_logprobs[mask].exp() * real).sum(-1).mean(),
        "student_support_mass": (batch.student_support_logprobs[mask].exp() * real).sum(-1).mean(),
        "sampled_in_support_fraction": sum(hits) / len(hits),
        "importance_ratio_mean": w.mean(),
        "importance_ratio_max": w.max(),
        "importance_ratio_capped_fraction": (w > 2).to(F64).mean(),
        "rollout_mismatch_kl": (w - 1 - w.log()).mean(),
        "advantage_mean": advantages.mean(),
        "advantage_std": advantages.std(correction=0),
        "advantage_clipped_fraction": (log_ratio.abs() > 1).to(F64).mean(),
        "policy_ratio_clipped_fraction": 0.0,
    }
    assert 0 < sum(hits) < len(hits)
    single_step = got.pop("single_step_kl")  # enumerated above, under oracle 4
    assert math.isfinite(single_step)
    assert got == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-9)


def test_language_model_loss_has_a_denominator_of_its_own() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.5], dtype=F64, requires_grad=True)
    parts = [language_model_loss(logprobs[:1], 3), language_model_loss(logprobs[1:], 3)]
    assert_close(sum(parts), 2.5)
    assert_close(torch.autograd.grad(sum(parts), logprobs)[0], [-1 / 3] * 3)
    assert_close(language_model_loss(logprobs[:0], 0), 0.0)
