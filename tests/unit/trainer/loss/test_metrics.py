"""Metrics of micro-batches to means over the trained tokens of a step."""

import math

import pytest
import torch

from services.config import LossConfig
from tests.unit.trainer.policies import F64, random_batch, take
from trainer.loss import LossMetrics, merge_metrics, minillm_loss


def metrics_of(advantages: list[float], ratios: list[float], mask: list[int], cu_seqlens: list[int]) -> LossMetrics:
    """Of a micro-batch whose tokens have "reverse_kl_k1" of ten times their advantage."""
    values = torch.tensor(advantages)
    return LossMetrics.of(
        {"reverse_kl_k1": 10 * values, "importance_ratio_capped_fraction": torch.tensor(ratios) > 2},
        values,
        torch.tensor(ratios),
        torch.tensor(mask, dtype=torch.bool),
        torch.tensor(cu_seqlens),
    )


def test_parts_of_a_step_are_merged_by_hand() -> None:
    """Trained: advantages 1, 2 and 6 of three sequences; the first token, the fourth and a fourth sequence are not."""
    first = metrics_of([9.0, 1.0, 2.0, math.nan], [99.0, 0.5, 3.0, math.inf], [0, 1, 1, 0], [0, 2, 3, 4])
    second = metrics_of([6.0], [1.5], [1], [0, 1])
    expected = {
        "reverse_kl_k1": 30.0,
        "importance_ratio_capped_fraction": 1 / 3,
        "advantage_mean": 3.0,
        "advantage_std": math.sqrt((4 + 1 + 9) / 3),
        "importance_ratio_max": 3.0,
        "num_valid_tokens": 3.0,
        "num_sequences": 3.0,
    }
    assert merge_metrics([first, second]) == pytest.approx(expected)
    assert merge_metrics([second, first]) == merge_metrics([first, second])


def test_parts_without_trained_tokens_change_nothing_and_have_no_mean_alone() -> None:
    trained, nothing = metrics_of([2.0], [0.25], [1], [0, 1]), metrics_of([7.0], [8.0], [0], [0, 1])
    assert merge_metrics([nothing, trained, metrics_of([], [], [], [0])]) == merge_metrics([trained])
    alone = merge_metrics([nothing])
    counts = {name: alone.pop(name) for name in ("num_valid_tokens", "num_sequences", "importance_ratio_max")}
    assert set(counts.values()) == {0.0} and len(alone) == 4 and all(map(math.isnan, alone.values()))


def test_sums_are_double_precision_scalars_without_gradient() -> None:
    """16,777,217 is no float32."""
    advantages = torch.tensor([2.0**24, 1.0], requires_grad=True)
    mask = torch.ones(2, dtype=torch.bool)
    metrics = LossMetrics.of({"reverse_kl_k1": advantages}, advantages, advantages, mask, torch.tensor([0, 2]))
    assert float(metrics.advantage_sum) == float(metrics.sums["reverse_kl_k1"]) == 2**24 + 1
    scalars = [value for name, value in vars(metrics).items() if name != "sums"] + list(metrics.sums.values())
    assert {(value.dtype, value.shape, value.requires_grad) for value in scalars} == {(F64, torch.Size(), False)}


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
