"""The single-step term: every estimator and divergence against the full vocabulary, enumerated (oracle 4)."""

import itertools

import pytest
import torch
from torch import Tensor

from services.config import LossConfig
from tests.unit.trainer.policies import F64, assert_close, exact, inputs_of
from trainer.loss import minillm_loss
from trainer.loss.divergences import FORWARD_KL, REVERSE_KL, jensen_shannon, single_step_divergence

DIVERGENCES = [
    {"single_step_divergence": "reverse_kl"},
    {"single_step_divergence": "forward_kl"},
    *({"single_step_divergence": "jsd", "jsd_beta": beta} for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
]
SUPPORTS = [list(s) for k in range(5) for s in itertools.combinations(range(5), k)]


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def by_definition(options: dict, student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence over the whole vocabulary, as the papers write it."""
    beta = options.get("jsd_beta", {"reverse_kl": 1.0, "forward_kl": 0.0}.get(options["single_step_divergence"]))
    if beta in (0.0, 1.0):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def expectation(
    config: LossConfig, options: dict, support: list[int], off_policy: bool = False
) -> tuple[Tensor, Tensor, float, Tensor]:
    """Expected gradient and the exact one; expected single_step_kl metric and the exact value; over all y ~ b."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, generator=generator, dtype=F64).requires_grad_()
    teacher, rollout, old = torch.randn(3, 5, generator=generator, dtype=F64).log_softmax(-1)
    student = logits.log_softmax(-1)
    rollout, old = (rollout, old) if off_policy else (student.detach(), student.detach())
    total, value = torch.zeros((), dtype=F64), 0.0
    for y in range(5):
        inputs = inputs_of(
            student[None],
            teacher[None],
            torch.tensor([y]),
            torch.tensor([support], dtype=torch.int64),
            rollout_logprobs=rollout[None, y],
            old_token_logprobs=old[None, y],
        )
        loss, metrics = minillm_loss(inputs, config)
        total = total + rollout[y].exp() * loss
        value += float(rollout[y].exp() * metrics.sums["single_step_kl"])
    wanted = by_definition(options, student, teacher)
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (total, wanted)]
    return gradients[0], gradients[1], value, wanted.detach()


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
def test_hybrid_is_the_whole_vocabulary_in_expectation_for_any_fixed_support(
    options: dict, off_policy: bool, support: list[int]
) -> None:
    sampling = {"importance_sampling": "tis", "importance_cap": 1e9} if off_policy else {}
    config = exact(rkl_advantage=False, **options, **sampling)
    gradient, wanted, metric, value = expectation(config, options, support, off_policy)
    assert_close(gradient, wanted)
    assert_close(value, metric)


@pytest.mark.parametrize("support", [s for s in SUPPORTS if 0 < len(s) < 4], ids=str)
@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
def test_truncated_is_a_lower_bound_with_another_gradient(options: dict, support: list[int]) -> None:
    config = exact(rkl_advantage=False, single_step_estimator="truncated", **options)
    gradient, wanted, metric, value = expectation(config, options, support)
    assert (gradient - wanted).abs().max() > 1e-4
    assert metric < value - 1e-4


@pytest.mark.parametrize("estimator", ["hybrid", "truncated", "full"])
@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
def test_all_estimators_agree_when_the_support_is_the_vocabulary(options: dict, estimator: str) -> None:
    config = exact(rkl_advantage=False, single_step_estimator=estimator, **options)
    gradient, wanted, metric, value = expectation(config, options, [4, 0, 2, 1, 3])
    assert_close(gradient, wanted)
    assert_close(value, metric)


def test_a_sampled_token_in_the_support_would_bias_hybrid() -> None:
    """Why y_t is not added to S: then nothing is ever sampled outside it, and hybrid is truncated."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, generator=generator, dtype=F64).requires_grad_()
    teacher = torch.randn(5, generator=generator, dtype=F64).log_softmax(-1)
    student = logits.log_softmax(-1)
    total = torch.zeros((), dtype=F64)
    for y in range(5):
        support = torch.tensor([[0, y if y else 1]])
        inputs = inputs_of(student[None], teacher[None], torch.tensor([y]), support)
        total = total + student[y].exp().detach() * minillm_loss(inputs, exact(rkl_advantage=False))[0]
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (total, kl(student, teacher))]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_full_refuses_a_support_that_is_not_the_whole_vocabulary() -> None:
    config = exact(rkl_advantage=False, single_step_estimator="full")
    student, teacher = torch.randn(2, 3, 5, dtype=F64).log_softmax(-1)
    for support in (torch.tensor([[0, 1]] * 3), torch.zeros(3, 0, dtype=torch.int64)):
        inputs = inputs_of(student, teacher, torch.zeros(3, dtype=torch.int64), support)
        with pytest.raises(ValueError, match="not the whole vocabulary"):
            minillm_loss(inputs, config)


def test_jsd_goes_over_into_both_kl_divergences() -> None:
    student, teacher = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=F64).log_softmax(-1)
    small = 1e-6
    for beta, limit in ((small, FORWARD_KL), (1 - small, REVERSE_KL)):
        divergence = jensen_shannon(beta).term(student, teacher).sum() / small
        assert_close(divergence, limit.term(student, teacher).sum(), 1e-4)
    assert jensen_shannon(0.0) is FORWARD_KL and jensen_shannon(1.0) is REVERSE_KL


@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
def test_the_forms_of_a_divergence_agree(options: dict) -> None:
    divergence = single_step_divergence(LossConfig(**options))
    student, teacher = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=F64).log_softmax(-1)
    q = student.exp().requires_grad_()
    term = divergence.term(q.log(), teacher)
    (derivative,) = torch.autograd.grad(term.sum(), q)
    difference = derivative - divergence.slope(student - teacher)
    assert_close(difference, difference[:1].expand(7), 1e-12)
    assert_close(student.exp() * divergence.per_mass(student - teacher), term.detach(), 1e-12)


@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
def test_a_sampled_token_of_hardly_any_probability_does_no_harm(options: dict) -> None:
    """exp(log q) underflows for the sampled token, outside the support, of student and teacher."""
    logits = torch.tensor([[0.0, 0.3, -111.0, -110.0]], requires_grad=True)
    inputs = inputs_of(
        logits.log_softmax(-1),
        torch.tensor([[0.1, 0.0, -110.0, -111.0]]).log_softmax(-1),
        torch.tensor([2]),
        torch.tensor([[0, 1]]),
    )
    loss, metrics = minillm_loss(inputs, exact(rkl_advantage=False, **options))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and metrics.sums["single_step_kl"].isfinite()


def test_a_dropped_token_has_no_gradient_however_large_its_factor() -> None:
    logits = torch.tensor([[0.0, 0.3, -111.0, -110.0]], requires_grad=True)
    student, teacher = logits.log_softmax(-1), torch.tensor([[0.1, 0.0, 0.2, 0.3]]).log_softmax(-1)  # p / q is infinite
    tokens, support = torch.tensor([2]), torch.tensor([[0, 1]])
    dropped = {"importance_sampling": "icepop", "single_step_divergence": "forward_kl"}
    inputs = inputs_of(student, teacher, tokens, support, rollout_logprobs=student[:, 2].detach() - 3)
    loss, _ = minillm_loss(inputs, exact(rkl_advantage=False, **dropped))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
def test_a_tail_without_mass_does_no_harm(options: dict) -> None:
    """exp underflows to 0 in the student's tail while the sampled token is in S: no NaN may come of the unused branch."""
    logits = torch.tensor([[0.0, 0.3, -400.0, -401.0]], requires_grad=True)
    teacher = torch.tensor([[0.1, 0.0, 0.2, 0.3]]).log_softmax(-1)
    inputs = inputs_of(logits.log_softmax(-1), teacher, torch.tensor([1]), torch.tensor([[0, 1]]))
    loss, metrics = minillm_loss(inputs, exact(rkl_advantage=False, **options))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and metrics.sums["single_step_kl"].isfinite()
