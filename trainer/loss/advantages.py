"""Rewards to advantages: discounted returns of the teacher's log ratios, and rewards from outside.

Everything here is detached. Shape legend: N completion positions, packed; B sequences, i owns
cu_seqlens[i]:cu_seqlens[i+1]; M trained positions (loss_mask = 1).
"""

from typing import Literal

import torch
from torch import Tensor

from services.config import LossConfig
from trainer.loss.aggregation import sequence_ids

# Keeps the advantage of a group whose rewards hardly differ from exploding.
_GROUP_STD_EPSILON = 1e-4


@torch.no_grad()
def token_advantages(
    rewards: Tensor, external_advantages: Tensor | None, loss_mask: Tensor, cu_seqlens: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """alpha_rkl times the return of the rewards plus alpha_reward times the sequence's own advantage, clipped.

    Args:
        rewards: [N] log p - log q of the *current* student; with the rollout policy's log-probability in place of q
            the expected gradient would gain a term that pushes q away from the rollout policy.
        external_advantages: [B], the same for all tokens of a sequence.

    Returns:
        Advantages [N], and which of them advantage_clip has changed [N].
    """
    advantages = torch.zeros_like(rewards)
    if config.has_policy_gradient:
        returns = reward_to_go(
            rewards, loss_mask, cu_seqlens, config.gamma, config.length_normalization, config.is_exclusive
        )
        advantages = config.alpha_rkl * returns
    if external_advantages is not None:
        of_position = external_advantages.to(rewards.dtype)[sequence_ids(cu_seqlens, len(rewards))]
        advantages = advantages + torch.where(loss_mask.bool(), config.alpha_reward * of_position, 0.0)
    if config.advantage_clip is None:
        return advantages, torch.zeros_like(loss_mask)
    return advantages.clamp(-config.advantage_clip, config.advantage_clip), advantages.abs() > config.advantage_clip


@torch.no_grad()
def reward_to_go(
    rewards: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    length_normalization: bool,
    exclusive: bool,
) -> Tensor:
    """Discounted sum of the rewards of the trained tokens from t on, within t's sequence.

    Inclusive: sum_j gamma^j r_{t+j}, over sum_j gamma^j with length normalisation (MiniLLM's R^Norm, eq. 6, at
    gamma = 1), j counting trained tokens only. Exclusive: gamma times the inclusive value at the next trained token.

    Args:
        rewards: [N].
        loss_mask: [N]; masked positions are skipped, do not age the discount, and are 0 in the result.
        cu_seqlens: [B+1].

    Returns:
        [N] detached, float32, or float64 for float64 rewards.
    """
    trained = loss_mask.bool().nonzero().squeeze(-1)
    owners = sequence_ids(cu_seqlens, len(rewards))[trained]
    kept = rewards.to(torch.promote_types(rewards.dtype, torch.float32))[trained]
    returns = _discounted_suffix_sum(kept, owners, gamma)
    if length_normalization:
        returns = returns / _discounted_suffix_sum(torch.ones_like(kept), owners, gamma)
    if exclusive:
        has_next = owners[1:] == owners[:-1]
        later = torch.where(has_next, gamma * returns[1:], 0.0)
        returns = torch.cat([later, torch.zeros_like(returns[:1])])
    return kept.new_zeros(len(rewards)).index_copy_(0, trained, returns)


def _discounted_suffix_sum(values: Tensor, owners: Tensor, gamma: float) -> Tensor:
    """sum_j gamma^j values[t+j] within each sequence, [M], in log2(M) doublings instead of M steps.

    After a round with distance d each entry covers the next 2d tokens (Hillis and Steele's scan).
    """
    total = values.clone()
    distance, decay = 1, gamma
    while distance < len(values) and decay > 0:
        same = owners[distance:] == owners[:-distance]
        total[:-distance] += torch.where(same, decay * total[distance:], 0.0)
        distance, decay = 2 * distance, decay * decay
    return total


def reward_advantages(
    rewards: Tensor, group_ids: Tensor, kind: Literal["group", "leave_one_out", "raw"] = "group"
) -> Tensor:
    """Rewards of whole completions to advantages, for LossInputs.external_advantages.

    Compute it over the whole step, before it is cut into micro-batches, which may part a group.

    Args:
        rewards: [B].
        group_ids: [B] int64 in 0..B-1; equal for completions of one prompt.
        kind: "group": (R - mean) / (std + 1e-4), the standard deviation that of the group itself (divided by its
            size); "leave_one_out": R minus the mean of the others (RLOO); "raw": R.

    Returns:
        [B]; 0 for a group of one, whatever its reward ("raw" apart): there is nothing to compare it with.
    """
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))  # 0 and 1 come as integers or booleans
    if kind == "raw":
        return rewards
    zeros = rewards.new_zeros(len(rewards))
    sizes = zeros.index_add(0, group_ids, torch.ones_like(rewards))
    means = zeros.index_add(0, group_ids, rewards) / sizes.clamp(min=1)
    centred = rewards - means[group_ids]
    if kind == "leave_one_out":
        # R - (sum - R) / (n - 1) = (R - mean) n / (n - 1)
        return centred * (sizes / (sizes - 1).clamp(min=1))[group_ids]
    variances = zeros.index_add(0, group_ids, centred.square()) / sizes.clamp(min=1)
    return centred / (variances.sqrt()[group_ids] + _GROUP_STD_EPSILON)
