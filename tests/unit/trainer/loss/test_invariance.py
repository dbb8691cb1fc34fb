"""What must change neither loss nor gradients nor metrics: padding, packing, splits, masked values (oracle 7)."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.config import LossConfig
from tests.unit.trainer.policies import F64, assert_close, per_position, random_batch, take
from trainer.loss import LossInputs, LossMetrics, LossTotals, merge_metrics, minillm_loss

STUDENT = ("student_token_logprobs", "student_support_logprobs", "student_tail_logprob")


def with_junk(batch: LossInputs, width: int, junk: float) -> tuple[LossInputs, Tensor]:
    """Each sequence padded to `width` with masked positions; junk fills those, the masked ones of old, and the pads."""
    cu, n = batch.cu_seqlens.tolist(), len(batch.loss_mask)
    rows = torch.tensor(
        [t if t < end else n for start, end in itertools.pairwise(cu) for t in range(start, start + width)]
    )
    fields = {}
    for name, value in per_position(batch).items():
        value = value.clone()
        if value.is_floating_point():
            value[~batch.loss_mask] = junk
            if "support" in name:
                value[batch.support_ids < 0] = junk
        filler = torch.full_like(value[:1], junk) if value.is_floating_point() else torch.zeros_like(value[:1])
        fields[name] = torch.cat([value, filler])[rows]
    fields["cu_seqlens"] = torch.arange(0, len(rows) + 1, width)
    if batch.external_advantages is not None:
        untrained = [not batch.loss_mask[start:end].any() for start, end in itertools.pairwise(cu)]
        fields["external_advantages"] = torch.where(torch.tensor(untrained), junk, batch.external_advantages)
    return LossInputs(**fields), rows


def loss_and_gradients(
    batch: LossInputs, config: LossConfig, totals: LossTotals
) -> tuple[Tensor, list[Tensor], LossMetrics]:
    """Loss, gradients with respect to the student's tensors, metrics."""
    student = {name: getattr(batch, name).detach().clone().requires_grad_() for name in STUDENT}
    loss, metrics = minillm_loss(replace(batch, **student), config, totals)
    gradients = torch.autograd.grad(loss, list(student.values()), allow_unused=True)
    zeros = [torch.zeros_like(x) for x in student.values()]
    return loss.detach(), [z if g is None else g for g, z in zip(gradients, zeros, strict=True)], metrics


CONFIGS = st.builds(
    LossConfig,
    gamma=st.sampled_from([1e-9, 0.7, 1.0]),  # gamma = 0 has nothing to learn in one of the combinations
    length_normalization=st.booleans(),
    reward_to_go=st.sampled_from(["auto", "inclusive", "exclusive"]),
    single_step_decomposition=st.booleans(),
    single_step_estimator=st.sampled_from(["hybrid", "truncated"]),
    single_step_divergence=st.sampled_from(["reverse_kl", "forward_kl", "jsd"]),
    jsd_beta=st.sampled_from([0.0, 0.3, 1.0]),
    importance_sampling=st.sampled_from(["none", "tis", "icepop"]),
    advantage_clip=st.sampled_from([None, 1.0]),
    aggregation=st.sampled_from(["token_mean", "sequence_mean", "sequence_sum", "constant"]),
)
BATCHES = st.builds(
    random_batch,
    st.integers(0, 20),
    lengths=st.tuples(st.integers(1, 6), *[st.integers(0, 6)] * 4),
    k=st.integers(0, 6),
    several_updates=st.booleans(),
    with_rewards=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, batch=BATCHES, parts=st.lists(st.integers(0, 2), min_size=5, max_size=5), data=st.data())
def test_micro_batch_split_and_packing_order_change_nothing(
    config: LossConfig, batch: LossInputs, parts: list[int], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(5)))
    groups = [[i for i in order if parts[i] == part] for part in range(3)]  # some are empty
    micro_batches = [take(batch, group) for group in groups]
    totals = LossTotals.sum([LossTotals.of(b.loss_mask, b.cu_seqlens, 8) for b, _ in micro_batches])
    loss, gradients, metrics = loss_and_gradients(batch, config, LossTotals.of(batch.loss_mask, batch.cu_seqlens, 8))

    results = [loss_and_gradients(b, config, totals) for b, _ in micro_batches]
    assert_close(sum(r[0] for r in results), loss)
    for j, expected in enumerate(gradients):
        summed = torch.zeros_like(expected)
        for (_, rows), result in zip(micro_batches, results, strict=True):
            summed[rows] += result[1][j]
        assert_close(summed, expected)
    merged, expected_metrics = merge_metrics([r[2] for r in results]), merge_metrics([metrics])
    assert merged == pytest.approx(expected_metrics, abs=1e-7, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(
    config=CONFIGS,
    batch=BATCHES,
    width=st.integers(6, 9),
    junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e300]),
)
def test_padding_and_values_at_masked_positions_change_nothing(
    config: LossConfig, batch: LossInputs, width: int, junk: float
) -> None:
    totals = LossTotals.of(batch.loss_mask, batch.cu_seqlens, 8)
    padded, rows = with_junk(batch, width, junk)
    assert LossTotals.of(padded.loss_mask, padded.cu_seqlens, 8) == totals
    loss, gradients, metrics = loss_and_gradients(batch, config, totals)
    got_loss, got_gradients, got_metrics = loss_and_gradients(padded, config, totals)
    assert_close(got_loss, loss)
    for got, expected in zip(got_gradients, gradients, strict=True):
        assert_close(got, torch.cat([expected, torch.zeros_like(expected[:1])])[rows])
    assert merge_metrics([got_metrics]) == pytest.approx(merge_metrics([metrics]), abs=1e-7, nan_ok=True)


@pytest.mark.parametrize("options", [{}, {"single_step_decomposition": False}, {"rkl_advantage": False}])
@pytest.mark.parametrize("num_sequences", [0, 2])
def test_micro_batch_without_trained_tokens_is_a_connected_zero(options: dict, num_sequences: int) -> None:
    batch, _ = take(random_batch(0), list(range(num_sequences)))
    leaf = torch.ones((), dtype=F64, requires_grad=True)
    student = {name: getattr(batch, name).detach() * leaf for name in STUDENT}
    nothing = replace(batch, **student, loss_mask=torch.zeros_like(batch.loss_mask))
    for totals in (None, LossTotals(10, 3)):
        loss, metrics = minillm_loss(nothing, LossConfig(**options), totals)
        assert float(loss.detach()) == 0.0
        assert float(torch.autograd.grad(loss, leaf, retain_graph=True)[0]) == 0.0
        assert float(metrics.num_valid_tokens) == float(metrics.num_sequences) == 0.0
    assert math.isnan(merge_metrics([metrics])["reverse_kl_k1"])
