"""Divergences of next-token distributions from a few log-probabilities: the support's, and one bucket for the rest.

A divergence here is a sum of terms h(q_v, p_v) over the vocabulary, h homogeneous of degree one (an f-divergence).
The tail of all tokens outside the support S is one more term h(q_tail, p_tail): a lower bound, by convexity.

Its gradient lacks what happens inside the tail. Since q_tail is the sum of its tokens, that is
    sum over v outside S of (h'(q_v, p_v) - h'(q_tail, p_tail)) grad q_v,    h' the derivative by q,
an expectation over y ~ q of [y outside S] (h'(q_y, p_y) - h'(q_tail, p_tail)) grad log q_y: a score-function term on
the tokens that were sampled anyway. Buckets and that term together are the "hybrid" estimator: its expected gradient
is the full vocabulary's as long as S does not depend on y (docs/losses.md).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from services.config import LossConfig


class Divergence(NamedTuple):
    """One f-divergence between student q and teacher p, elementwise."""

    term: Callable[[Tensor, Tensor], Tensor]
    """h(q, p) from log q and log p."""
    per_mass: Callable[[Tensor], Tensor]
    """h(q, p) / q from log q - log p: what a sampled token contributes, without dividing by its probability."""
    slope: Callable[[Tensor], Tensor]
    """dh / dq from log q - log p, up to a constant: the derivatives of all terms sum to one, so it has no effect."""


REVERSE_KL = Divergence(
    term=lambda log_q, log_p: log_q.exp() * (log_q - log_p),
    per_mass=lambda log_ratio: log_ratio,
    slope=lambda log_ratio: log_ratio,
)
FORWARD_KL = Divergence(
    term=lambda log_q, log_p: log_p.exp() * (log_p - log_q),
    per_mass=lambda log_ratio: -log_ratio * (-log_ratio).exp(),
    slope=lambda log_ratio: -(-log_ratio).exp(),
)


def jensen_shannon(beta: float) -> Divergence:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, eq. 1).

    At beta = 0 and 1 this is identically zero; as there, they stand for forward and reverse KL, its limits once
    divided by beta and 1 - beta.
    """
    if beta in (0.0, 1.0):
        return REVERSE_KL if beta else FORWARD_KL
    log_p_share, log_q_share = math.log(beta), math.log1p(-beta)

    def term(log_q: Tensor, log_p: Tensor) -> Tensor:
        log_m = torch.logaddexp(log_p + log_p_share, log_q + log_q_share)
        return beta * log_p.exp() * (log_p - log_m) + (1.0 - beta) * log_q.exp() * (log_q - log_m)

    def log_m_over_q(log_ratio: Tensor) -> Tensor:
        return torch.logaddexp(log_p_share - log_ratio, torch.full_like(log_ratio, log_q_share))

    def per_mass(log_ratio: Tensor) -> Tensor:
        m = log_m_over_q(log_ratio)
        return -beta * (-log_ratio).exp() * (log_ratio + m) - (1.0 - beta) * m

    return Divergence(term, per_mass, slope=lambda log_ratio: -(1.0 - beta) * log_m_over_q(log_ratio))


def single_step_divergence(config: LossConfig) -> Divergence:
    """The divergence that the run file names."""
    named = {"reverse_kl": REVERSE_KL, "forward_kl": FORWARD_KL, "jsd": jensen_shannon(config.jsd_beta)}
    return named[config.single_step_divergence]


def bucketed(divergence: Divergence, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """[N] divergence of the buckets, with gradient.

    The tail's bucket is not optional: without it reverse KL is minimised by moving mass off S.

    Args:
        student, teacher: log-probabilities of the support [N, K] and of the tail [N]; equal (0, say) at entries that
            belong to no bucket.
    """
    (q_support, q_tail), (p_support, p_tail) = student, teacher
    return divergence.term(q_support, p_support).sum(-1) + divergence.term(q_tail, p_tail)


class TailCorrection(NamedTuple):
    """What the buckets lack, estimated from a sampled token outside S; detached."""

    factor: Tensor
    """[N] of log q(y): the gradient of their product, in expectation over y, is that inside the tail."""
    value: Tensor
    """[N] what completes the divergence, in expectation over y."""


@torch.no_grad()
def tail_correction(divergence: Divergence, token_log_ratio: Tensor, tail_log_ratio: Tensor) -> TailCorrection:
    """Compare the sampled token with the tail it is part of.

    Args:
        token_log_ratio: [N] log q(y) - log p(y).
        tail_log_ratio: [N] the same of the masses outside S.
    """
    return TailCorrection(
        divergence.slope(token_log_ratio) - divergence.slope(tail_log_ratio),
        divergence.per_mass(token_log_ratio) - divergence.per_mass(tail_log_ratio),
    )
