"""Policies small enough to enumerate, and the loss's inputs from their log-probabilities."""

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from services.config import LossConfig
from trainer.loss import LossInputs, minillm_loss

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


def random_batch(
    seed: int,
    lengths: tuple[int, ...] = (4, 1, 6, 3, 5),
    vocabulary: int = 6,
    k: int = 2,
    several_updates: bool = False,
    with_rewards: bool = False,
) -> LossInputs:
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
    if 0 < k < vocabulary:
        padded[::3, -1] = -1
    old = batch.student_token_logprobs + 0.3 * torch.randn(n, generator=generator, dtype=F64)
    return replace(
        batch,
        support_ids=padded,
        old_token_logprobs=old if several_updates else None,
        external_advantages=torch.randn(len(lengths), generator=generator, dtype=F64) if with_rewards else None,
    )


def per_position(batch: LossInputs) -> dict[str, Tensor]:
    """The fields whose first dimension is the position."""
    of_sequences = ("cu_seqlens", "external_advantages")
    return {name: value for name, value in vars(batch).items() if value is not None and name not in of_sequences}


def take(batch: LossInputs, sequences: list[int]) -> tuple[LossInputs, Tensor]:
    """The chosen sequences in the given order, and the positions [n] they come from."""
    cu = batch.cu_seqlens.tolist()
    rows = torch.tensor([t for i in sequences for t in range(cu[i], cu[i + 1])], dtype=torch.int64)
    lengths = [cu[i + 1] - cu[i] for i in sequences]
    fields = {name: value[rows] for name, value in per_position(batch).items()}
    fields["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
    if batch.external_advantages is not None:
        fields["external_advantages"] = batch.external_advantages[sequences]
    return LossInputs(**fields), rows
