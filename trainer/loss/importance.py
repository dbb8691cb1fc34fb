"""From the policy that sampled to the one that learns: importance weights, and clipping for several updates a batch.

w_t = q_old / b      the trainer at the start of the step against the rollout engine: staleness and the
                     numerical mismatch of the two engines together; a constant factor
rho_t = q / q_old    what the updates on this batch have changed since; carries the gradient
"""

from typing import NamedTuple

import torch
from torch import Tensor

from services.config import LossConfig

# Beyond exp(20) a ratio says only that two policies have nothing in common; infinity would make NaN of a zero advantage.
_MAX_LOG_RATIO = 20.0


class Importance(NamedTuple):
    """w_t and what is made of it; detached."""

    log_ratio: Tensor  # [N] log w_t
    ratio: Tensor  # [N] w_t
    weight: Tensor  # [N] f(w_t)
    is_capped: Tensor  # [N] bool, capped ("tis") or dropped ("icepop")


@torch.no_grad()
def importance_weights(old_token_logprobs: Tensor, rollout_logprobs: Tensor, config: LossConfig) -> Importance:
    """f(w_t): 1 ("none"), min(w, cap) ("tis"), or w inside a band and 0 outside ("icepop").

    A dropped token leaves the numerator of the loss only: the denominators are counted before any forward pass.
    """
    log_ratio = old_token_logprobs - rollout_logprobs
    ratio = log_ratio.clamp(max=_MAX_LOG_RATIO).exp()
    if config.importance_sampling == "tis":
        return Importance(log_ratio, ratio, ratio.clamp(max=config.importance_cap), ratio > config.importance_cap)
    if config.importance_sampling == "icepop":
        is_dropped = (ratio < config.icepop_low) | (ratio > config.icepop_high)
        return Importance(log_ratio, ratio, ratio.masked_fill(is_dropped, 0.0), is_dropped)
    return Importance(log_ratio, ratio, torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool))


def policy_ratio(token_logprobs: Tensor, old_token_logprobs: Tensor) -> Tensor:
    """rho_t [N]; without gradient where it is bounded, beyond exp(20)."""
    return (token_logprobs - old_token_logprobs).clamp(max=_MAX_LOG_RATIO).exp()


def policy_gradient(
    token_logprobs: Tensor, old_token_logprobs: Tensor | None, weight: Tensor, advantages: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Loss [N] of the policy-gradient term, and which tokens [N] clipping has left without gradient.

    Args:
        token_logprobs: [N] log q of the sampled tokens, with gradient.
        old_token_logprobs: [N] log q before the first update on this batch, or None on that first update, when
            - f(w) A log q has the gradient of the clipped form (PPO, arXiv 1707.06347, eq. 7) and less to compute.
        weight: [N] f(w_t).
        advantages: [N].
    """
    if old_token_logprobs is None:
        return -(weight * advantages) * token_logprobs, torch.zeros_like(token_logprobs, dtype=torch.bool)
    rho = policy_ratio(token_logprobs, old_token_logprobs)
    free, bounded = rho * advantages, rho.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * advantages
    return -weight * torch.minimum(free, bounded), bounded < free
