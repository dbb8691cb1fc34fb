"""Metrics of the trained tokens: sums of each micro-batch, which any split of a step adds up to the same means.

Shape legend: N completion positions, packed; B sequences, i owns cu_seqlens[i]:cu_seqlens[i+1].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.loss.aggregation import tokens_per_sequence


@dataclass(frozen=True)
class LossMetrics:
    """Metrics of one micro-batch, to be combined by `merge_metrics`: float64 scalars, on the device of the loss."""

    sums: dict[str, Tensor]  # over the trained tokens, each by the name that its mean has in metrics.jsonl
    advantage_sum: Tensor  # over the trained tokens
    advantage_square_sum: Tensor  # over the trained tokens
    importance_ratio_max: Tensor  # of the trained tokens; 0 where there is none
    num_valid_tokens: Tensor  # trained tokens
    num_sequences: Tensor  # those with a trained token

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        per_token: dict[str, Tensor],
        advantages: Tensor,
        importance_ratio: Tensor,
        loss_mask: Tensor,
        cu_seqlens: Tensor,
    ) -> "LossMetrics":
        """Add up what each token has.

        Args:
            per_token: [N] each, numbers or booleans, by the name of the mean.
            advantages: [N].
            importance_ratio: [N], not negative.
            loss_mask: [N] bool; at other positions everything may be NaN or infinite.
            cu_seqlens: [B+1].
        """
        of_advantages = (advantages, advantages.double().square())
        stacked = torch.stack([value.double() for value in (*of_advantages, *per_token.values())])
        advantage_sum, advantage_square_sum, *sums = torch.where(loss_mask, stacked, 0.0).sum(-1)
        ratios = torch.where(loss_mask, importance_ratio.double(), 0.0)
        per_sequence = tokens_per_sequence(loss_mask, cu_seqlens)
        return cls(
            sums=dict(zip(per_token, sums, strict=True)),
            advantage_sum=advantage_sum,
            advantage_square_sum=advantage_square_sum,
            importance_ratio_max=torch.cat([ratios, ratios.new_zeros(1)]).amax(),
            num_valid_tokens=per_sequence.sum().double(),
            num_sequences=(per_sequence > 0).sum().double(),
        )


def merge_metrics(
    parts: Sequence[LossMetrics], gather: Callable[[Tensor], Tensor] = lambda rows: rows
) -> dict[str, float]:
    """Combine the metrics of the micro-batches of a step, at least one.

    Args:
        gather: rows [n, k] of this rank to those of all ranks, [m, k], float64 on the CPU.

    Returns:
        Means over the step's trained tokens and "advantage_std" (divided by their number), NaN where there is none;
        "importance_ratio_max" and the counts, of the whole step.
    """
    names = list(parts[0].sums)
    # Stacked, so that all values leave their device in one copy.
    rows = [
        torch.stack(
            [
                part.advantage_sum,
                part.advantage_square_sum,
                part.importance_ratio_max,
                part.num_valid_tokens,
                part.num_sequences,
                *(part.sums[name] for name in names),
            ]
        )
        for part in parts
    ]
    columns = zip(*gather(torch.stack(rows).cpu()).tolist(), strict=True)
    advantages, advantage_squares, ratio_maxima, tokens, sequences, *sums = columns
    num_tokens = math.fsum(tokens)

    def mean(column: tuple[float, ...]) -> float:
        return math.fsum(column) / num_tokens if num_tokens else math.nan

    advantage_mean = mean(advantages)
    variance = mean(advantage_squares) - advantage_mean**2
    return {
        **{name: mean(column) for name, column in zip(names, sums, strict=True)},
        "advantage_mean": advantage_mean,
        "advantage_std": math.sqrt(max(variance, 0.0)) if num_tokens else math.nan,
        "importance_ratio_max": max(ratio_maxima),
        "num_valid_tokens": num_tokens,
        "num_sequences": math.fsum(sequences),
    }
