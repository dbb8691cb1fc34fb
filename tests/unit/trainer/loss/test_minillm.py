"""The MiniLLM loss against enumeration: closed forms and exact sequence-level gradients (oracles 1 to 6)."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from services.config import LossConfig
from tests.unit.trainer.policies import (
    DECOMPOSED,
    F64,
    PURE_PG,
    assert_close,
    binary,
    enumerate_sequences,
    exact,
    exact_kl,
    expected_gradient,
    inputs_of,
    random_batch,
)
from trainer.loss import merge_metrics, minillm_loss

# --- oracle 1 and 2: binary tokens ---


@pytest.mark.parametrize("full", [True, False])
def test_one_binary_token(full: bool) -> None:
    logits, teacher, support = binary([0.3], [0.8])
    config = exact(rkl_advantage=False)
    inputs = inputs_of(logits.log_softmax(-1), teacher, torch.tensor([1]), support, full=full)
    loss, _ = minillm_loss(inputs, config)
    (gradient,) = torch.autograd.grad(loss, logits)
    q = 1 / (1 + math.exp(-0.3))
    assert_close(loss, 0.1310690, 5e-8)
    assert_close(loss, q * math.log(q / 0.8) + (1 - q) * math.log((1 - q) / 0.2))
    assert_close(gradient[0, 0], -0.2655537, 5e-8)
    assert_close(gradient[0, 0], q * (1 - q) * (0.3 - math.log(0.8 / 0.2)))


TWO_STEPS = [
    (PURE_PG, [-0.2775271, -0.0127618, 0.0553799]),
    (DECOMPOSED, [-0.2775271, -0.0127618, 0.0553799]),
    ({**DECOMPOSED, "reward_to_go": "exclusive"}, [-0.2775271, -0.0127618, 0.0553799]),
    ({**DECOMPOSED, "reward_to_go": "inclusive"}, [-0.5430808, -0.0255237, 0.1107598]),
    ({**PURE_PG, "gamma": 0.5}, [-0.2715404, None, None]),
    ({**PURE_PG, "gamma": 0.5, "length_normalization": True}, [-0.1810269, None, None]),
    ({**PURE_PG, "length_normalization": True}, [-0.1387636, None, None]),
]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("options", "expected"), TWO_STEPS)
def test_two_binary_steps(options: dict, expected: list[float | None], full: bool) -> None:
    logits, teacher, support = binary([0.3, -0.5, 1.1], [0.8, 0.4, 0.6])
    sequences = enumerate_sequences(2, 2, end_token=None)
    assert_close(exact_kl(logits, teacher, sequences), 0.1529704, 5e-8)
    gradient = expected_gradient(exact(**options), logits, teacher, sequences, support, full)[:, 0]
    for got, value in zip(gradient, expected, strict=True):
        if value is not None:
            assert_close(got, value, 6e-8)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_discounted_gradients_of_two_steps_are_those_of_the_score_function(gamma: float, normalize: bool) -> None:
    """E[sum_t grad log q(y_t) (r_t + gamma r_t+1) / den], written out for two steps."""
    logits, teacher, support = binary([0.3, -0.5, 1.1], [0.8, 0.4, 0.6])
    sequences = enumerate_sequences(2, 2, end_token=None)
    surrogate = torch.zeros((), dtype=F64)
    for nodes, tokens in sequences:
        log_q = logits.log_softmax(-1)[nodes, tokens]
        first, second = (teacher[nodes, tokens] - log_q).detach()
        returns = torch.stack([(first + gamma * second) / (1 + gamma if normalize else 1), second])
        surrogate = surrogate - log_q.sum().exp().detach() * (log_q * returns).sum()
    (expected,) = torch.autograd.grad(surrogate, logits)
    config = exact(**{**PURE_PG, "gamma": gamma, "length_normalization": normalize})
    assert_close(expected_gradient(config, logits, teacher, sequences, support), expected, 1e-12)


# --- oracle 3: three tokens of which one ends the sequence, up to three steps ---


@pytest.mark.parametrize(("support_size", "full"), [(3, False), (1, False), (0, False), (1, True)])
@pytest.mark.parametrize("options", [PURE_PG, DECOMPOSED])
def test_expected_gradient_is_that_of_the_sequence_level_reverse_kl(
    options: dict, support_size: int, full: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    sequences = enumerate_sequences(3, 3, end_token=2)
    assert len(sequences) == 1 + 2 + 12
    logits = torch.randn(7, 3, generator=generator, dtype=F64).requires_grad_()
    teacher = torch.randn(7, 3, generator=generator, dtype=F64).log_softmax(-1)
    supports = teacher.argsort(-1, descending=True)[:, :support_size]
    (expected,) = torch.autograd.grad(exact_kl(logits, teacher, sequences), logits)
    assert expected.abs().min() > 1e-4
    assert_close(expected_gradient(exact(**options), logits, teacher, sequences, supports, full), expected)


# --- oracle 5: the special cases ---


def test_gamma_zero_without_single_step_is_thinking_machines_distillation() -> None:
    batch = random_batch(0)
    inputs = replace(batch, student_token_logprobs=batch.student_token_logprobs.detach().requires_grad_())
    config = LossConfig(single_step_decomposition=False, advantage_clip=None, importance_cap=1e9)
    (gradient,) = torch.autograd.grad(minillm_loss(inputs, config)[0], inputs.student_token_logprobs)
    reverse_kl = (inputs.student_token_logprobs - inputs.teacher_token_logprobs).detach()
    ratio = (inputs.student_token_logprobs.detach() - inputs.rollout_logprobs).exp()
    mask = inputs.loss_mask.to(F64)
    assert_close(gradient, mask * ratio * reverse_kl / mask.sum())


def test_single_step_alone_on_the_full_vocabulary_is_gkd_reverse_kl() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, teacher = torch.randn(2, 6, 5, generator=generator, dtype=F64)
    teacher = teacher.log_softmax(-1)
    tokens = torch.randint(5, (6,), generator=generator)
    everything = torch.stack([torch.randperm(5, generator=generator) for _ in range(6)])
    student = logits.requires_grad_().log_softmax(-1)
    gkd = torch.nn.functional.kl_div(teacher, student, log_target=True, reduction="sum") / 6
    (expected,) = torch.autograd.grad(gkd, logits, retain_graph=True)
    for full in (False, True):  # from every token's buckets, or handed in
        inputs = inputs_of(student, teacher, tokens, everything, full=full)
        loss, metrics = minillm_loss(inputs, LossConfig(rkl_advantage=False, single_step_estimator="full"))
        assert_close(loss, gkd)
        assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], expected)
        assert_close(metrics.sums["single_step_kl"] / 6, gkd)


@pytest.mark.parametrize("options", [PURE_PG, DECOMPOSED])
def test_expected_gradient_equals_finite_differences_of_the_sequence_level_reverse_kl(options: dict) -> None:
    generator = torch.Generator().manual_seed(3)
    sequences = enumerate_sequences(3, 3, end_token=2)
    logits = torch.randn(7, 3, generator=generator, dtype=F64).requires_grad_()
    teacher = torch.randn(7, 3, generator=generator, dtype=F64).log_softmax(-1)
    gradient = expected_gradient(exact(**options), logits, teacher, sequences, teacher.argsort(-1)[:, 2:])
    for node, token in itertools.product(range(7), range(3)):
        step = torch.zeros(7, 3, dtype=F64)
        step[node, token] = 1e-5
        upper, lower = (exact_kl(logits.detach() + s * step, teacher, sequences) for s in (1, -1))
        assert_close((upper - lower) / 2e-5, gradient[node, token], 1e-9)


# --- oracle 6: nothing to learn, and bounded tokens ---


@pytest.mark.parametrize("estimator", ["hybrid", "truncated"])
@pytest.mark.parametrize("reward", ["inclusive", "exclusive"])
def test_student_equal_to_teacher_has_zero_loss_and_gradient(estimator: str, reward: str) -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=F64).requires_grad_()
    support = torch.tensor([[0, 3]]).expand(6, 2)
    inputs = inputs_of(logits.log_softmax(-1), logits.log_softmax(-1).detach(), torch.arange(6) % 5, support)
    loss, _ = minillm_loss(inputs, exact(gamma=0.9, reward_to_go=reward, single_step_estimator=estimator))
    assert_close(loss, 0.0)
    assert_close(torch.autograd.grad(loss, logits)[0], torch.zeros(6, 5), 1e-12)


def token_gradient(config: LossConfig, log_w: float = 0.0, log_ratio: float = 0.5) -> tuple[float, dict[str, float]]:
    """d loss / d log q(y) of one token outside S, and the merged metrics; q = 1/4 of four tokens, S = {0}, y = 1."""
    student = torch.full((1, 4), 0.25, dtype=F64).log()
    teacher = torch.tensor([[0.1, 0.25 * math.exp(log_ratio), 0.0, 0.0]], dtype=F64)
    teacher[0, 2:] = (1 - teacher.sum()) / 2
    rollout = student[:, 1] - log_w
    inputs = inputs_of(student, teacher.log(), torch.tensor([1]), torch.tensor([[0]]), rollout_logprobs=rollout)
    leaf = inputs.student_token_logprobs.requires_grad_()
    loss, metrics = minillm_loss(replace(inputs, student_token_logprobs=leaf), config)
    return float(torch.autograd.grad(loss, leaf)[0]), merge_metrics([metrics])


# Gradient of the token at w = 1: the policy-gradient term alone is -(log p - log q); the hybrid correction alone is
# -((log p - log q) - (log p_tail - log q_tail)).
TERMS = [
    ({"single_step_decomposition": False}, -0.5),
    ({"rkl_advantage": False}, -(0.5 - math.log(0.9 / 0.75))),
]


@pytest.mark.parametrize(("term", "on_policy"), TERMS)
@pytest.mark.parametrize(
    ("sampling", "w", "weight", "counted"),
    [
        ("none", 8.0, 1.0, 0),
        ("tis", 1.5, 1.5, 0),
        ("tis", 2.5, 2.0, 1),
        ("tis", 8.0, 2.0, 1),
        ("tis", 0.1, 0.1, 0),
        ("icepop", 4.0, 4.0, 0),
        ("icepop", 6.0, 0.0, 1),
        ("icepop", 0.4, 0.0, 1),
    ],
)
def test_importance_sampling(
    term: dict, on_policy: float, sampling: str, w: float, weight: float, counted: int
) -> None:
    gradient, metrics = token_gradient(LossConfig(importance_sampling=sampling, **term), math.log(w))
    assert gradient == pytest.approx(weight * on_policy, abs=1e-12)
    assert metrics["importance_ratio_mean"] == pytest.approx(w)
    assert metrics["importance_ratio_max"] == pytest.approx(w)
    assert metrics["importance_ratio_capped_fraction"] == counted
    assert metrics["rollout_mismatch_kl"] == pytest.approx(w - 1 - math.log(w))


@pytest.mark.parametrize(("log_ratio", "expected", "clipped"), [(0.5, -0.3, 1), (-0.5, 0.3, 1), (0.2, -0.2, 0)])
def test_advantage_clip_bounds_the_advantage_and_counts(log_ratio: float, expected: float, clipped: int) -> None:
    config = LossConfig(single_step_decomposition=False, advantage_clip=0.3)
    gradient, metrics = token_gradient(config, log_ratio=log_ratio)
    assert gradient == pytest.approx(expected)
    assert metrics["advantage_mean"] == pytest.approx(-expected)
    assert metrics["advantage_clipped_fraction"] == clipped


def test_weights_of_the_terms() -> None:
    assert token_gradient(LossConfig(single_step_decomposition=False, alpha_rkl=3.0))[0] == pytest.approx(-1.5)
    assert token_gradient(LossConfig(rkl_advantage=False, alpha_single_step=3.0))[0] == pytest.approx(3 * TERMS[1][1])
    # Defaults: gamma = 0 and the single-step term on make the advantage exclusive, hence zero.
    gradient, metrics = token_gradient(LossConfig())
    assert gradient == pytest.approx(TERMS[1][1])
    assert metrics["advantage_mean"] == 0.0
