"""Scored samples to tensors: padded rows for the forward pass, packed completion positions for the loss.

The shift, that position prompt_length - 1 + t predicts completion token t, is in services/models/padding.py, once.

Shapes: B samples of a micro-batch, T padded length, N completion positions, K teacher candidates.
"""

from dataclasses import dataclass

import numpy as np
import torch

from services.config import LossConfig
from services.models.padding import cut_by_padded_tokens, pad_rows, predicting_positions
from trainer.loss.head import HeadOutput
from trainer.loss.minillm import LossInputs
from trainer.teacher_scores import ScoredSample


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass needs."""

    input_ids: torch.Tensor  # [B, T] int64, padded on the right
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


@dataclass(frozen=True)
class TextBatch:
    """Given tokens for one forward pass: windows of dataset text, of which all but the first token are predicted, or completions
    that nobody scores."""

    input_ids: torch.Tensor  # [B, T] int64, padded on the right
    positions: torch.Tensor  # [N] int64
    token_ids: torch.Tensor  # [N] int64

    def to(self, device: torch.device) -> "TextBatch":
        return TextBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


def pack_texts(windows: list[list[int]], tokens_per_micro_batch: int, boundary: int | None = None) -> list[TextBatch]:
    """Cut windows of at least two tokens into micro-batches, as `pack` does."""
    groups = cut_by_padded_tokens([len(w) for w in windows], tokens_per_micro_batch, boundary=boundary)
    return [_pack_texts([windows[index] for index in group]) for group in groups]


def _pack_texts(windows: list[list[int]]) -> TextBatch:
    return pack_sequences([window[:1] for window in windows], [window[1:] for window in windows])


def pack_sequences(prompts: list[list[int]], completions: list[list[int]]) -> TextBatch:
    """Prompts with given completions, whose tokens are predicted; neither is empty."""
    lengths = [len(completion) for completion in completions]
    input_ids = pad_rows([[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)])
    positions = predicting_positions([len(prompt) for prompt in prompts], lengths, input_ids.shape[1])
    return TextBatch(input_ids, positions, torch.tensor([token for completion in completions for token in completion]))


def pack(
    samples: list[ScoredSample], config: LossConfig, tokens_per_micro_batch: int, boundary: int | None = None
) -> list[MicroBatch]:
    """Cut a batch into micro-batches of rows of similar length.

    Args:
        samples: of one optimizer step; truncated completions are left out unless `config.truncated` is "train": masked
            ones have no part in the loss either, and need no forward pass.
        tokens_per_micro_batch: bound on B * T; a longer sample stands alone.
        boundary: samples up to this length and longer ones are never in one micro-batch (`rope_switch`).
    """
    used = [s for s in samples if config.truncated == "train" or not s.rollout.completion.truncated]
    groups = cut_by_padded_tokens([len(s.rollout.sequence) for s in used], tokens_per_micro_batch, boundary=boundary)
    return [_pack_group([used[index] for index in group]) for group in groups]


def _pack_group(samples: list[ScoredSample]) -> MicroBatch:
    rollouts = [s.rollout for s in samples]
    completions = [r.completion for r in rollouts]
    lengths = [len(c.token_ids) for c in completions]
    input_ids = pad_rows([r.sequence for r in rollouts])
    return MicroBatch(
        input_ids=input_ids,
        positions=predicting_positions([len(r.prompt.token_ids) for r in rollouts], lengths, input_ids.shape[1]),
        token_ids=_concatenate([c.token_ids for c in completions], np.int64),
        loss_mask=torch.ones(sum(lengths), dtype=torch.bool),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
        rollout_logprobs=_concatenate([c.rollout_logprobs for c in completions]),
        teacher_token_logprobs=_concatenate([s.teacher_token_logprobs for s in samples]),
        support_ids=_concatenate([s.support_ids for s in samples], np.int64),
        teacher_support_logprobs=_concatenate([s.teacher_support_logprobs for s in samples]),
        teacher_tail_logprob=_concatenate([s.teacher_tail_logprobs for s in samples]),
    )


def _concatenate(arrays: list[np.ndarray], dtype: type = np.float32) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype))


def loss_inputs(batch: MicroBatch, output: HeadOutput, old_token_logprobs: torch.Tensor | None = None) -> LossInputs:
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
    )
