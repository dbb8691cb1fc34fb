"""Scored samples to tensors: padded rows for the forward pass, packed completion positions for the loss.

The shift happens here, once: the hidden state at position prompt_length - 1 + t predicts completion token t.

Shapes: B samples of a micro-batch, T padded length, N completion positions, K teacher candidates.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from services.config import LossConfig
from trainer.teacher_scores import ScoredSample

# Right padding is masked out of attention and never read, so any id does.
_PAD_ID = 0


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass needs."""

    input_ids: torch.Tensor  # [B, T] int64, padded on the right
    attention_mask: torch.Tensor  # [B, T] int64
    positions: torch.Tensor  # [N] int64 into the B * T hidden states: those that predict token_ids
    token_ids: torch.Tensor  # [N] int64, sampled tokens
    loss_mask: torch.Tensor  # [N] bool, tokens that count
    cu_seqlens: torch.Tensor  # [B + 1] int64, sample i owns cu_seqlens[i]:cu_seqlens[i + 1]
    rollout_logprobs: torch.Tensor  # [N] float32
    teacher_token_logprobs: torch.Tensor  # [N] float32
    support_ids: torch.Tensor  # [N, K] int64
    teacher_support_logprobs: torch.Tensor  # [N, K] float32
    teacher_tail_logprob: torch.Tensor  # [N] float32

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


def pack(samples: list[ScoredSample], config: LossConfig, tokens_per_micro_batch: int) -> list[MicroBatch]:
    """Cut a batch into micro-batches of rows of similar length.

    Args:
        samples: of one optimizer step; truncated ones are left out when `config.truncated` is "drop".
        tokens_per_micro_batch: bound on B * T; a longer sample stands alone.
    """
    used = [s for s in samples if not (config.truncated == "drop" and s.rollout.completion.truncated)]
    groups = cut_by_padded_tokens([len(s.rollout.sequence) for s in used], tokens_per_micro_batch)
    return [_pack_group([used[index] for index in group], config.truncated) for group in groups]


def cut_by_padded_tokens(lengths: list[int], limit: int) -> list[list[int]]:
    """Indices in groups of similar length whose size times longest length stays below `limit`."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        if not groups or (len(groups[-1]) + 1) * longest > limit:
            groups.append([])
        groups[-1].append(index)
    return groups


def pad_rows(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] token ids padded on the right, and their [B, T] attention mask."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), _PAD_ID, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def predicting_positions(prompt_lengths: list[int], completion_lengths: list[int], padded_length: int) -> torch.Tensor:
    """[N] indices into the flattened [B * T] hidden states: those whose next token is a completion token."""
    rows = [
        np.arange(length) + (row * padded_length + prompt - 1)
        for row, (prompt, length) in enumerate(zip(prompt_lengths, completion_lengths, strict=True))
    ]
    return torch.from_numpy(np.concatenate(rows))


def _pack_group(samples: list[ScoredSample], truncated: Literal["train", "mask", "drop"]) -> MicroBatch:
    rollouts = [s.rollout for s in samples]
    completions = [r.completion for r in rollouts]
    lengths = [len(c.token_ids) for c in completions]
    input_ids, attention_mask = pad_rows([r.sequence for r in rollouts])
    counts = [not (truncated == "mask" and c.truncated) for c in completions]
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        positions=predicting_positions([len(r.prompt.token_ids) for r in rollouts], lengths, input_ids.shape[1]),
        token_ids=_concatenate([c.token_ids for c in completions], np.int64),
        loss_mask=torch.from_numpy(np.repeat(counts, lengths)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
        rollout_logprobs=_concatenate([c.rollout_logprobs for c in completions]),
        teacher_token_logprobs=_concatenate([s.teacher_token_logprobs for s in samples]),
        support_ids=_concatenate([s.support_ids for s in samples], np.int64),
        teacher_support_logprobs=_concatenate([s.teacher_support_logprobs for s in samples]),
        teacher_tail_logprob=_concatenate([s.teacher_tail_logprobs for s in samples]),
    )


def _concatenate(arrays: list[np.ndarray], dtype: type = np.float32) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype))
