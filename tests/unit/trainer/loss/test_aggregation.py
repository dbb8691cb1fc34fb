"""Token losses to one number: weights of tokens, totals over a step."""

from dataclasses import replace

import pytest
import torch

from services.config import LossConfig
from tests.unit.trainer.policies import F64, assert_close, inputs_of, random_batch
from trainer.loss import LossTotals, language_model_loss, minillm_loss


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


def test_language_model_loss_has_a_denominator_of_its_own() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.5], dtype=F64, requires_grad=True)
    parts = [language_model_loss(logprobs[:1], 3), language_model_loss(logprobs[1:], 3)]
    assert_close(sum(parts), 2.5)
    assert_close(torch.autograd.grad(sum(parts), logprobs)[0], [-1 / 3] * 3)
    assert_close(language_model_loss(logprobs[:0], 0), 0.0)
