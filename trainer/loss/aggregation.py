"""Token losses to one number, so that no split of a step into parts changes it.

Shape legend: N completion positions, packed; B sequences, i owns cu_seqlens[i]:cu_seqlens[i+1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from services.config import LossConfig


@dataclass(frozen=True)
class LossTotals:
    """Denominators of an optimizer step, counted over all its micro-batches and ranks before the first backward."""

    num_valid_tokens: int  # trained tokens
    num_sequences: int  # those with a trained token, so that a micro-batch that only fills up a rank changes nothing
    max_completion_length: int | None = None  # longest possible completion, tokens; for the "constant" aggregation

    @classmethod
    def of(cls, loss_mask: Tensor, cu_seqlens: Tensor, max_completion_length: int | None = None) -> "LossTotals":
        """Count loss_mask [N] of the sequences cu_seqlens [B+1]."""
        per_sequence = tokens_per_sequence(loss_mask.bool(), cu_seqlens)
        return cls(int(per_sequence.sum()), int((per_sequence > 0).sum()), max_completion_length)

    @classmethod
    def sum(cls, parts: Sequence["LossTotals"]) -> "LossTotals":
        """Add up micro-batches, or ranks.

        Raises:
            ValueError: they disagree on max_completion_length.
        """
        lengths = {part.max_completion_length for part in parts}
        if len(lengths) > 1:
            raise ValueError(f"max_completion_length differs within one step: {lengths}; give all parts the same")
        tokens, sequences = (sum(getattr(p, name) for p in parts) for name in ("num_valid_tokens", "num_sequences"))
        return cls(tokens, sequences, lengths.pop() if lengths else None)

    def over_ranks(self, device: torch.device | str = "cpu") -> "LossTotals":
        """The sum over the ranks of the default process group, or this one's own counts where there is none.

        Where gradients are averaged over ranks (DDP, FSDP), multiply each rank's loss by their number.

        Args:
            device: of the counts while they travel; a cuda device for nccl.
        """
        if not dist.is_initialized():
            return self
        counts = torch.tensor([self.num_valid_tokens, self.num_sequences], device=device)
        dist.all_reduce(counts)
        num_valid_tokens, num_sequences = counts.tolist()
        return LossTotals(num_valid_tokens, num_sequences, self.max_completion_length)


def sequence_ids(cu_seqlens: Tensor, num_positions: int) -> Tensor:
    """[N] index of the sequence that owns each position."""
    lengths = cu_seqlens.diff()
    ids = torch.arange(len(lengths), device=cu_seqlens.device)
    return torch.repeat_interleave(ids, lengths, output_size=num_positions)


def tokens_per_sequence(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[B] trained tokens of each sequence, int64; mask [N]."""
    ids = sequence_ids(cu_seqlens, len(mask))
    return ids.new_zeros(len(cu_seqlens) - 1).index_add_(0, ids, mask.long())


def token_weights(
    mask: Tensor, cu_seqlens: Tensor, config: LossConfig, totals: LossTotals, dtype: torch.dtype
) -> Tensor | float:
    """Factor of each token's loss, [N] of `dtype` or one number.

    "sequence_sum" and "constant" are proportional to the gradient of the sequence-level reverse KL; the other two
    reweigh tokens by the lengths of the sequences in the batch.

    Raises:
        ValueError: "constant" without totals.max_completion_length.
    """
    num_sequences = max(1, totals.num_sequences)
    match config.aggregation:
        case "token_mean":
            return 1.0 / max(1, totals.num_valid_tokens)
        case "sequence_sum":
            return 1.0 / num_sequences
        case "sequence_mean":
            lengths = tokens_per_sequence(mask, cu_seqlens).clamp(min=1)
            return (lengths.to(dtype) * num_sequences).reciprocal()[sequence_ids(cu_seqlens, len(mask))]
        case "constant":
            if totals.max_completion_length is None:
                raise ValueError(
                    'loss.aggregation = "constant" got totals.max_completion_length = None; pass '
                    "LossTotals.of(..., max_completion_length=sampling.max_new_tokens)"
                )
            return 1.0 / (num_sequences * totals.max_completion_length)
