"""Scored samples to tensors: padded rows for the forward pass, packed completion positions for the loss.

The shift, that position prompt_length - 1 + t predicts completion token t, is in services/models/padding.py, once.

Shapes: B samples of a micro-batch, T padded length, N completion positions, K teacher candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.config import LossConfig, RewardConfig
from services.models.padding import PaddedSequences, cut_for_ranks, pad_sequences
from services.wire.batch import TrainingBatch
from trainer.groups import PromptGroup, Rollout, ScoredSample
from trainer.loss import LossInputs
from trainer.loss.head import HeadOutput
from trainer.rewards.totals import advantages


@dataclass(frozen=True)
class MicroBatch(PaddedSequences):
    """What one forward and backward pass needs: samples, whose completions are predicted, and what the loss takes of them."""

    samples: torch.Tensor  # [B] int64, places of the samples in the batch
    loss_mask: torch.Tensor  # [N] bool, tokens that count
    cu_seqlens: torch.Tensor  # [B + 1] int64, sample i owns cu_seqlens[i]:cu_seqlens[i + 1]
    rollout_logprobs: torch.Tensor  # [N] float32
    teacher_token_logprobs: torch.Tensor  # [N] float32
    support_ids: torch.Tensor  # [N, K] int64
    teacher_support_logprobs: torch.Tensor  # [N, K] float32
    teacher_tail_logprob: torch.Tensor  # [N] float32
    external_advantages: torch.Tensor | None = None  # [B] float64, of rewards


def pack_texts(
    windows: list[list[int]],
    tokens_per_micro_batch: int,
    boundary: int | None = None,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> list[PaddedSequences]:
    """Cut windows of at least two tokens, all but the first of which are predicted, into micro-batches, as `pack` does."""
    groups = cut_for_ranks([len(w) for w in windows], tokens_per_micro_batch, rank, num_ranks, boundary)
    return [pad_sequences([windows[index] for index in group], [1] * len(group)) for group in groups]


def collect(
    groups: list[PromptGroup],
    metrics: dict[str, float] | None = None,
    windows: Sequence[list[int]] = (),
    reward_names: Sequence[str] = (),
) -> TrainingBatch:
    """The scored samples of one step as columns.

    Args:
        metrics: of how they came about.
        windows: of text, whose cross-entropy is learned in the step as well.
        reward_names: of the functions that gave the samples' rewards.
    """
    places = [group.place for group in groups for _ in group.samples]
    samples = [sample for group in groups for sample in group.samples]
    rollouts = [sample.rollout for sample in samples]
    completions, prompts = [r.completion for r in rollouts], [r.prompt for r in rollouts]
    return TrainingBatch(
        rows=np.array([prompt.row for prompt in prompts], np.int64),
        groups=np.array(places, np.int64),
        prompt_lengths=np.array([len(prompt.token_ids) for prompt in prompts], np.int64),
        completion_lengths=np.array([len(completion.token_ids) for completion in completions], np.int64),
        truncated=np.array([completion.truncated for completion in completions], np.bool_),
        policy_versions=np.array([r.policy_version for r in rollouts], np.int64),
        prompt_ids=np.array([token for prompt in prompts for token in prompt.token_ids], np.int32),
        token_ids=_joined([c.token_ids for c in completions], np.int32),
        rollout_logprobs=_joined([c.rollout_logprobs for c in completions]),
        teacher_token_logprobs=_joined([s.teacher_token_logprobs for s in samples]),
        support_ids=_joined([s.support_ids for s in samples], np.int32),
        teacher_support_logprobs=_joined([s.teacher_support_logprobs for s in samples]),
        teacher_tail_logprob=_joined([s.teacher_tail_logprob for s in samples]),
        loss_mask=_loss_masks(rollouts),
        window_lengths=np.array([len(window) for window in windows], np.int64),
        window_ids=_joined([np.array(window) for window in windows], np.int32),
        rewards=_rewards(samples, len(reward_names)) if reward_names else None,
        reward_names=list(reward_names),
        texts=[prompt.text for prompt in prompts],
        metrics=metrics or {},
    )


def _loss_masks(rollouts: list[Rollout]) -> np.ndarray:
    """[N] bool, or [0] where every token was sampled by the student."""
    if all(rollout.loss_mask is None for rollout in rollouts):
        return np.zeros(0, np.bool_)
    whole = [np.ones(len(rollout.completion.token_ids), np.bool_) for rollout in rollouts]
    return _joined([w if r.loss_mask is None else r.loss_mask for r, w in zip(rollouts, whole, strict=True)], np.bool_)


def _rewards(samples: list[ScoredSample], num_functions: int) -> np.ndarray:
    rows = [[np.nan if reward is None else reward for reward in sample.rewards] for sample in samples]
    return np.array(rows, np.float64).reshape(len(samples), num_functions)


def _joined(arrays: list[np.ndarray], dtype: type = np.float32) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)


def pack(
    batch: TrainingBatch,
    config: LossConfig,
    tokens_per_micro_batch: int,
    boundary: int | None = None,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    rewards: RewardConfig | None = None,
) -> list[MicroBatch]:
    """Cut a rank's share of a batch into micro-batches of rows of similar length, as many as every other rank has.

    Args:
        batch: of one optimizer step; truncated completions are left out unless `config.truncated` is "train": masked
            ones have no part in the loss either, and need no forward pass. Their rewards are compared with those of
            their group unless it is "drop".
        tokens_per_micro_batch: bound on B * T; a longer sample stands alone.
        boundary: samples up to this length and longer ones are never in one micro-batch (`rope_switch`).
        rewards: how the batch's rewards become advantages; None: they do not.

    Raises:
        PeerError: the batch's rewards are not those of `rewards`.
    """
    of_samples = None if rewards is None else advantages(batch, rewards, config.truncated)
    used = [index for index in range(len(batch)) if config.truncated == "train" or not batch.truncated[index]]
    lengths = (batch.prompt_lengths + batch.completion_lengths)[used].tolist()
    groups = cut_for_ranks(lengths, tokens_per_micro_batch, rank, num_ranks, boundary)
    return [_pack_group(batch, [used[index] for index in group], of_samples) for group in groups]


def _pack_group(batch: TrainingBatch, group: list[int], advantages: torch.Tensor | None) -> MicroBatch:
    ranges = [np.arange(*batch.completion(index).indices(len(batch.token_ids))) for index in group]
    rows = np.concatenate([np.zeros(0, np.int64), *ranges])
    sequences = [[*batch.prompt(index).tolist(), *batch.token_ids[batch.completion(index)].tolist()] for index in group]
    padded = pad_sequences(sequences, batch.prompt_lengths[group].tolist())

    def column(values: np.ndarray, dtype: type = np.float32) -> torch.Tensor:
        return torch.from_numpy(values[rows].astype(dtype))

    return MicroBatch(
        **vars(padded),
        samples=torch.tensor(group, dtype=torch.int64),
        loss_mask=column(batch.counts(), np.bool_),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(batch.completion_lengths[group])])),
        rollout_logprobs=column(batch.rollout_logprobs),
        teacher_token_logprobs=column(batch.teacher_token_logprobs),
        support_ids=column(batch.support_ids, np.int64),
        teacher_support_logprobs=column(batch.teacher_support_logprobs),
        teacher_tail_logprob=column(batch.teacher_tail_logprob),
        external_advantages=None if advantages is None else advantages[group],
    )


def loss_inputs(
    batch: MicroBatch,
    output: HeadOutput,
    old_token_logprobs: torch.Tensor | None = None,
    reference_token_logprobs: torch.Tensor | None = None,
    policy_gradient_mask: torch.Tensor | None = None,
) -> LossInputs:
    """Student and teacher side by side, position by position."""
    return LossInputs(
        student_token_logprobs=output.token_logprobs,
        student_support_logprobs=output.support_logprobs,
        student_tail_logprob=output.tail_logprob,
        student_entropies=output.entropy,
        old_token_logprobs=old_token_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        teacher_token_logprobs=batch.teacher_token_logprobs,
        teacher_support_logprobs=batch.teacher_support_logprobs,
        teacher_tail_logprob=batch.teacher_tail_logprob,
        support_ids=batch.support_ids,
        token_ids=batch.token_ids,
        loss_mask=batch.loss_mask,
        cu_seqlens=batch.cu_seqlens,
        external_advantages=batch.external_advantages,
        reference_token_logprobs=reference_token_logprobs,
        policy_gradient_mask=policy_gradient_mask,
    )
