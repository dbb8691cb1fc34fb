"""The MiniLLM loss against enumeration: closed forms, exact sequence-level gradients, and what must change nothing."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.config import LossConfig
from trainer.loss import LossInputs, LossTotals, merge_metrics, minillm_loss, reward_to_go

F64 = torch.float64
PURE_PG = {"single_step_decomposition": False, "gamma": 1.0, "length_normalization": False}
DECOMPOSED = {"gamma": 1.0, "length_normalization": False}


def exact(**options: Any) -> LossConfig:
    """A config without the approximations that trade bias for variance."""
    return LossConfig(
        **{"advantage_clip": None, "importance_sampling": "none", "aggregation": "sequence_sum", **options}
    )


def assert_close(got: Tensor, expected: Tensor | list, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=tolerance)


def full_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum(-1)


def tail_of(logprobs: Tensor, support_ids: Tensor) -> Tensor:
    if support_ids.shape[-1] == logprobs.shape[-1]:
        return torch.full_like(logprobs[..., 0], -torch.inf).detach()
    in_support = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, support_ids, True)
    return logprobs.masked_fill(in_support, -torch.inf).logsumexp(-1)


def inputs_of(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    support_ids: Tensor,
    cu_seqlens: list[int] | None = None,
    loss_mask: Tensor | None = None,
    full: bool = False,
    **fields: Tensor,
) -> LossInputs:
    """LossInputs from [N, V] log-probabilities; by default one sequence, everything trained, rollout = student."""

    def of_tokens(logprobs: Tensor) -> Tensor:
        return logprobs.gather(-1, token_ids[:, None])[:, 0]

    return LossInputs(
        student_token_logprobs=of_tokens(student),
        student_support_logprobs=student.gather(-1, support_ids),
        student_tail_logprob=tail_of(student, support_ids),
        rollout_logprobs=fields.pop("rollout_logprobs", of_tokens(student).detach()),
        teacher_token_logprobs=of_tokens(teacher),
        teacher_support_logprobs=teacher.gather(-1, support_ids),
        teacher_tail_logprob=tail_of(teacher, support_ids),
        support_ids=support_ids,
        token_ids=token_ids,
        loss_mask=torch.ones(len(token_ids), dtype=torch.bool) if loss_mask is None else loss_mask,
        cu_seqlens=torch.tensor(cu_seqlens or [0, len(token_ids)]),
        single_step_kl=full_kl(student, teacher) if full else None,
        **fields,
    )


# --- policies small enough to enumerate: logits [nodes, V], one node per unfinished prefix ---


def enumerate_sequences(vocabulary: int, length: int, end_token: int | None) -> list[tuple[list[int], list[int]]]:
    """(nodes visited, tokens) of every complete sequence; nodes are numbered in breadth-first order."""
    prefixes: list[tuple[int, ...]] = [()]
    for prefix in prefixes:  # grows while it is read
        if len(prefix) < length - 1:
            prefixes += [(*prefix, v) for v in range(vocabulary) if v != end_token]
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    complete = [
        (*prefix, v) for prefix in prefixes for v in range(vocabulary) if v == end_token or len(prefix) == length - 1
    ]
    return [([index[s[:t]] for t in range(len(s))], list(s)) for s in complete]


def sequence_logprob(logprobs: Tensor, sequence: tuple[list[int], list[int]]) -> Tensor:
    return logprobs[torch.tensor(sequence[0]), torch.tensor(sequence[1])].sum()


def exact_kl(student_logits: Tensor, teacher: Tensor, sequences: list) -> Tensor:
    q = torch.stack([sequence_logprob(student_logits.log_softmax(-1), s) for s in sequences])
    p = torch.stack([sequence_logprob(teacher, s) for s in sequences])
    assert_close(q.exp().sum(), 1.0)
    return (q.exp() * (q - p)).sum()


def expected_gradient(
    config: LossConfig, logits: Tensor, teacher: Tensor, sequences: list, supports: Tensor, full: bool = False
) -> Tensor:
    """Gradient of the loss in expectation over the student's own sequences."""
    total = torch.zeros((), dtype=F64)
    for nodes, tokens in sequences:
        student = logits.log_softmax(-1)[nodes]
        inputs = inputs_of(student, teacher[nodes], torch.tensor(tokens), supports[nodes], full=full)
        weight = sequence_logprob(logits.log_softmax(-1), (nodes, tokens)).exp().detach()
        total = total + weight * minillm_loss(inputs, config)[0]
    return torch.autograd.grad(total, logits)[0]


def binary(x: list[float], p: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes with q_A = sigmoid(x) and p_A = p: student logits with gradient, teacher logprobs, S = {A}."""
    logits = torch.stack([torch.tensor(x, dtype=F64), torch.zeros(len(x), dtype=F64)], -1).requires_grad_()
    teacher = torch.tensor([[a, 1 - a] for a in p], dtype=F64).log()
    return logits, teacher, torch.zeros(len(x), 1, dtype=torch.int64)


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


# --- oracle 4: the estimators of the single-step term ---


def single_step_gradient(
    estimator: str, support: list[int], off_policy: bool = False, sampling: str = "none"
) -> tuple[Tensor, Tensor, list[float], Tensor]:
    """Expected gradient and its full-vocabulary value; single_step_kl per token and its value; over all y ~ b."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, generator=generator, dtype=F64).requires_grad_()
    teacher, rollout, old = torch.randn(3, 5, generator=generator, dtype=F64).log_softmax(-1)
    student = logits.log_softmax(-1)
    rollout, old = (rollout, old) if off_policy else (student.detach(), student.detach())
    config = exact(
        rkl_advantage=False, single_step_estimator=estimator, importance_sampling=sampling, importance_cap=1e9
    )
    total, expected_metric = torch.zeros((), dtype=F64), 0.0
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
        expected_metric += float(rollout[y].exp() * metrics["sum/single_step_kl"])
    kl = full_kl(student, teacher)
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (total, kl)]
    return gradients[0], gradients[1], [expected_metric], kl.detach()


SUPPORTS = [list(s) for k in range(5) for s in itertools.combinations(range(5), k)]


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("off_policy", [False, True])
def test_hybrid_is_the_full_kl_in_expectation_for_any_fixed_support(support: list[int], off_policy: bool) -> None:
    sampling = "tis" if off_policy else "none"
    gradient, full, metric, kl = single_step_gradient("hybrid", support, off_policy, sampling)
    assert_close(gradient, full)
    assert_close(kl, metric[0])


@pytest.mark.parametrize("support", [s for s in SUPPORTS if 0 < len(s) < 4])
def test_truncated_is_a_lower_bound_with_another_gradient(support: list[int]) -> None:
    gradient, full, metric, kl = single_step_gradient("truncated", support)
    assert (gradient - full).abs().max() > 1e-3
    assert metric[0] < kl - 1e-3


def test_all_estimators_agree_when_the_support_is_the_vocabulary() -> None:
    for estimator in ("hybrid", "truncated"):
        gradient, full, metric, kl = single_step_gradient(estimator, [4, 0, 2, 1, 3])
        assert_close(gradient, full)
        assert_close(kl, metric[0])


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
    student, teacher = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=F64).log_softmax(-1)
    inputs = inputs_of(
        student, teacher, torch.zeros(6, dtype=torch.int64), torch.zeros(6, 1, dtype=torch.int64), full=True
    )
    loss, _ = minillm_loss(inputs, LossConfig(rkl_advantage=False))
    assert_close(loss, torch.nn.functional.kl_div(teacher, student, log_target=True, reduction="sum") / 6)


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


# --- oracle 7: what must change nothing ---


def random_batch(seed: int, lengths: tuple[int, ...] = (4, 1, 6, 3, 5), vocabulary: int = 6, k: int = 2) -> LossInputs:
    """A batch off policy, with some masked positions and pads; every per-position tensor is float64."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    student, teacher, rollout = (1.5 * torch.randn(3, n, vocabulary, generator=generator, dtype=F64)).log_softmax(-1)
    tokens = torch.randint(vocabulary, (n,), generator=generator)
    support = torch.rand(n, vocabulary, generator=generator).argsort(-1)[:, :k]
    mask = torch.rand(n, generator=generator) > 0.25
    batch = inputs_of(
        student,
        teacher,
        tokens,
        support,
        cu_seqlens=[0, *itertools.accumulate(lengths)],
        loss_mask=mask,
        rollout_logprobs=rollout.gather(-1, tokens[:, None])[:, 0],
        student_entropies=-(student.exp() * student).sum(-1),
    )
    padded = support.clone()
    padded[::3, 1] = -1
    return replace(batch, support_ids=padded)


STUDENT = ("student_token_logprobs", "student_support_logprobs", "student_tail_logprob")
PER_POSITION = [
    name for name in vars(random_batch(0)) if name not in ("cu_seqlens", "old_token_logprobs", "single_step_kl")
]


def take(batch: LossInputs, sequences: list[int]) -> tuple[LossInputs, Tensor]:
    """The chosen sequences in the given order, and the positions [n] they come from."""
    cu = batch.cu_seqlens.tolist()
    rows = torch.tensor([t for i in sequences for t in range(cu[i], cu[i + 1])], dtype=torch.int64)
    lengths = [cu[i + 1] - cu[i] for i in sequences]
    fields = {name: getattr(batch, name)[rows] for name in PER_POSITION}
    return LossInputs(**fields, cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)])), rows


def with_junk(batch: LossInputs, width: int, junk: float) -> tuple[LossInputs, Tensor]:
    """Each sequence padded to `width` with masked positions; junk fills those, the masked ones of old, and the pads."""
    cu, n = batch.cu_seqlens.tolist(), len(batch.loss_mask)
    rows = torch.tensor(
        [t if t < end else n for start, end in itertools.pairwise(cu) for t in range(start, start + width)]
    )
    fields = {}
    for name in PER_POSITION:
        value = getattr(batch, name).clone()
        if value.is_floating_point():
            value[~batch.loss_mask] = junk
            if "support" in name:
                value[batch.support_ids < 0] = junk
        filler = torch.full_like(value[:1], junk) if value.is_floating_point() else torch.zeros_like(value[:1])
        fields[name] = torch.cat([value, filler])[rows]
    cu_seqlens = torch.arange(0, len(rows) + 1, width)
    return LossInputs(**fields, cu_seqlens=cu_seqlens), rows


def loss_and_gradients(
    batch: LossInputs, config: LossConfig, totals: LossTotals
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Loss, gradients with respect to the student's tensors, metrics."""
    student = {name: getattr(batch, name).detach().clone().requires_grad_() for name in STUDENT}
    loss, metrics = minillm_loss(replace(batch, **student), config, totals)
    gradients = torch.autograd.grad(loss, list(student.values()), allow_unused=True)
    zeros = [torch.zeros_like(x) for x in student.values()]
    return loss.detach(), [z if g is None else g for g, z in zip(gradients, zeros, strict=True)], metrics


CONFIGS = st.builds(
    LossConfig,
    gamma=st.sampled_from([0.0, 0.7, 1.0]),
    length_normalization=st.booleans(),
    reward_to_go=st.sampled_from(["auto", "inclusive", "exclusive"]),
    single_step_decomposition=st.booleans(),
    single_step_estimator=st.sampled_from(["hybrid", "truncated"]),
    importance_sampling=st.sampled_from(["none", "tis", "icepop"]),
    advantage_clip=st.sampled_from([None, 1.0]),
    aggregation=st.sampled_from(["token_mean", "sequence_mean", "sequence_sum", "constant"]),
)


@settings(max_examples=60, deadline=None)
@given(
    config=CONFIGS, seed=st.integers(0, 20), parts=st.lists(st.integers(0, 2), min_size=5, max_size=5), data=st.data()
)
def test_micro_batch_split_and_packing_order_change_nothing(
    config: LossConfig, seed: int, parts: list[int], data: st.DataObject
) -> None:
    batch = random_batch(seed)
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
    assert merged == pytest.approx(expected_metrics, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    config=CONFIGS,
    seed=st.integers(0, 20),
    width=st.integers(6, 9),
    junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e300]),
)
def test_padding_and_values_at_masked_positions_change_nothing(
    config: LossConfig, seed: int, width: int, junk: float
) -> None:
    batch = random_batch(seed)
    totals = LossTotals.of(batch.loss_mask, batch.cu_seqlens, 8)
    padded, rows = with_junk(batch, width, junk)
    assert LossTotals.of(padded.loss_mask, padded.cu_seqlens, 8) == totals
    loss, gradients, metrics = loss_and_gradients(batch, config, totals)
    got_loss, got_gradients, got_metrics = loss_and_gradients(padded, config, totals)
    assert_close(got_loss, loss)
    for got, expected in zip(got_gradients, gradients, strict=True):
        assert_close(got, torch.cat([expected, torch.zeros_like(expected[:1])])[rows])
    assert merge_metrics([got_metrics]) == pytest.approx(merge_metrics([metrics]), abs=1e-7)


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
        assert float(metrics["num_valid_tokens"]) == float(metrics["num_sequences"]) == 0.0
    assert math.isnan(merge_metrics([metrics])["reverse_kl_k1"])


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
    }
    assert 0 < sum(hits) < len(hits)
    single_step = got.pop("single_step_kl")  # enumerated above, under oracle 4
    assert math.isfinite(single_step)
    assert got == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-9)


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
