"""Several updates on one batch: clipping of the policy ratio, by hand and by enumeration."""

import math
from dataclasses import replace

import pytest
import torch

from services.config import LossConfig
from tests.unit.trainer.policies import F64, assert_close, exact, exact_kl, inputs_of, sequence_logprob
from tests.unit.trainer.policies import enumerate_sequences as all_sequences
from trainer.loss import merge_metrics, minillm_loss, reward_to_go

PG = {"single_step_decomposition": False}


def clipped_gradient(advantage: float, rho: float, w: float = 1.0, **options: float) -> tuple[float, float]:
    """d loss / d log q(y) of one token, and the fraction of tokens that clipping leaves without gradient."""
    log_q = torch.tensor([math.log(0.25)], dtype=F64, requires_grad=True)
    old = log_q.detach() - math.log(rho)
    student = torch.full((1, 4), 0.25, dtype=F64).log()
    inputs = inputs_of(student, student, torch.tensor([0]), torch.tensor([[1]]), rollout_logprobs=old - math.log(w))
    inputs = replace(
        inputs,
        student_token_logprobs=log_q,
        old_token_logprobs=old,
        teacher_token_logprobs=log_q.detach() + advantage,
    )
    loss, metrics = minillm_loss(inputs, LossConfig(**PG, **options))
    fraction = merge_metrics([metrics])["policy_ratio_clipped_fraction"]
    return float(torch.autograd.grad(loss, log_q)[0]), fraction


@pytest.mark.parametrize(
    ("advantage", "rho", "expected", "clipped"),
    [
        (2.0, 1.0, -2.0, 0),  # the first update: -A
        (2.0, 1.1, -2.2, 0),  # inside the band: -rho A
        (2.0, 1.3, 0.0, 1),  # raised enough already
        (2.0, 0.5, -1.0, 0),  # lowered although it is good: free to come back
        (-2.0, 0.7, 0.0, 1),  # lowered enough already
        (-2.0, 1.5, 3.0, 0),  # raised although it is bad: free to come back
    ],
)
def test_clipping_by_hand(advantage: float, rho: float, expected: float, clipped: int) -> None:
    gradient, fraction = clipped_gradient(advantage, rho)
    assert gradient == pytest.approx(expected, abs=1e-12)
    assert fraction == clipped


def test_clip_bounds_are_separate_and_the_weight_stands_outside() -> None:
    assert clipped_gradient(2.0, 1.3, clip_high=0.4)[0] == pytest.approx(-2.6)
    assert clipped_gradient(-2.0, 0.7, clip_low=0.4)[0] == pytest.approx(1.4)
    assert clipped_gradient(2.0, 1.1, w=1.5)[0] == pytest.approx(-3.3)
    assert clipped_gradient(2.0, 1.1, w=8.0)[0] == pytest.approx(-4.4)  # tis caps w at 2
    assert clipped_gradient(2.0, 1.1, w=8.0, importance_sampling="icepop")[0] == 0.0


def test_a_batch_whose_old_policy_is_the_current_one_has_the_gradient_of_a_first_update() -> None:
    student, teacher = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=F64).log_softmax(-1)
    tokens, support = torch.arange(6) % 5, torch.tensor([[0, 3]] * 6)
    gradients = []
    for with_old in (False, True):
        logits = student.clone().requires_grad_()
        inputs = inputs_of(logits.log_softmax(-1), teacher, tokens, support)
        if with_old:
            inputs = replace(inputs, old_token_logprobs=inputs.student_token_logprobs.detach())
        loss, _ = minillm_loss(inputs, exact(gamma=0.9))
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert_close(gradients[1], gradients[0], 1e-12)


def test_second_update_follows_the_per_token_surrogate_in_expectation() -> None:
    """Unclipped, over sequences of the old policy: the gradient of sum_t rho_t sg(A_t), A_t that of the current policy."""
    generator = torch.Generator().manual_seed(3)
    sequences = all_sequences(3, 3, end_token=2)
    old, teacher = torch.randn(2, 7, 3, generator=generator, dtype=F64).log_softmax(-1)
    logits = (old + 0.2 * torch.randn(7, 3, generator=generator, dtype=F64)).requires_grad_()
    config = exact(**PG, gamma=1.0, length_normalization=False, clip_low=0.999, clip_high=1e9)
    total = expected = torch.zeros((), dtype=F64)
    for nodes, tokens in sequences:
        student = logits.log_softmax(-1)[nodes]
        of_old = old[torch.tensor(nodes), torch.tensor(tokens)]
        inputs = inputs_of(
            student,
            teacher[nodes],
            torch.tensor(tokens),
            torch.zeros(len(tokens), 1, dtype=torch.int64),
            rollout_logprobs=of_old,
            old_token_logprobs=of_old,
        )
        weight = sequence_logprob(old, (nodes, tokens)).exp()
        total = total + weight * minillm_loss(inputs, config)[0]
        log_q = inputs.student_token_logprobs
        rewards = (inputs.teacher_token_logprobs - log_q).detach()
        returns = reward_to_go(rewards, inputs.loss_mask, inputs.cu_seqlens, 1.0, False, False)
        expected = expected - weight * ((log_q - of_old).exp() * returns).sum()
    assert exact_kl(logits, teacher, sequences) > 0
    got, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (total, expected))
    assert wanted.abs().max() > 0.01
    assert_close(got, wanted, 1e-12)


def test_old_logprobs_carry_no_gradient_even_if_they_could() -> None:
    student, teacher = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=F64).log_softmax(-1)
    attached = torch.randn(6, dtype=F64).requires_grad_()
    inputs = inputs_of(student.requires_grad_(), teacher, torch.arange(6) % 5, torch.tensor([[0, 3]] * 6))
    old = inputs.student_token_logprobs.detach() + 0.1 * attached
    loss, _ = minillm_loss(replace(inputs, old_token_logprobs=old), exact(gamma=0.9))
    loss.backward()
    assert attached.grad is None


def test_policies_with_nothing_in_common_give_finite_numbers() -> None:
    """A ratio that overflows must not turn a zero advantage into NaN, nor the metrics."""
    student = torch.tensor([[-0.001, -200.0]]).log_softmax(-1).requires_grad_()
    inputs = inputs_of(student, student.detach(), torch.tensor([0]), torch.tensor([[0]]))
    inputs = replace(inputs, old_token_logprobs=torch.tensor([-95.0]), rollout_logprobs=torch.tensor([-200.0]))
    loss, metrics = minillm_loss(inputs, LossConfig())
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()
    assert all(math.isfinite(value) for value in merge_metrics([metrics]).values())


def test_half_precision_is_widened_before_anything_is_computed() -> None:
    student, teacher = (2 * torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))).log_softmax(-1)
    tokens, support = torch.arange(6) % 5, torch.tensor([[0, 3]] * 6)
    half = inputs_of(student.bfloat16(), teacher.bfloat16(), tokens, support)
    wide = replace(half, **{n: v.float() for n, v in vars(half).items() if v is not None and v.is_floating_point()})
    losses = [minillm_loss(inputs, LossConfig(gamma=0.9))[0] for inputs in (half, wide)]
    assert losses[0].dtype == torch.float32 and torch.equal(losses[0], losses[1])
