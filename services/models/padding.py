"""Sequences to padded rows, and where in them tokens are predicted; for the teacher and the trainer.

Rows, not packed sequences: sdpa has no variable-length path and would build a dense mask over a packed batch.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

# Any id does: on the right, causal attention keeps it from every token, and nobody reads what comes out at it.
_PAD_ID = 0


def cut_by_padded_tokens(
    lengths: list[int], limit: int, most_padding: int | None = None, boundary: int | None = None
) -> list[list[int]]:
    """Indices in groups of similar length whose size times longest length stays below `limit`.

    Args:
        most_padding: tokens of padding that a group may have; more cost more than a group of its own.
        boundary: lengths up to here and longer ones are never in one group (`services.models.causal_lm.rope_switch`).
    """
    groups: list[list[int]] = []
    longest = padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padding += longest - lengths[index]
        is_wasteful = most_padding is not None and padding > most_padding
        is_apart = boundary is not None and lengths[index] <= boundary < longest
        if not groups or (len(groups[-1]) + 1) * longest > limit or is_wasteful or is_apart:
            groups.append([])
            longest, padding = lengths[index], 0
        groups[-1].append(index)
    return groups


def share_out(lengths: list[int], num_ranks: int) -> list[list[int]]:
    """Indices for each rank, with nearly the same number of tokens: the longest first, each to the rank that has least."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = tokens.index(min(tokens))
        shares[rank].append(index)
        tokens[rank] += lengths[index]
    return shares


def cut_for_ranks(
    lengths: list[int], limit: int, rank: int, num_ranks: int, boundary: int | None = None
) -> list[list[int]]:
    """What one rank runs of some sequences, as `cut_by_padded_tokens`; on every rank the same number of groups, for a forward
    pass is a collective. Groups that fill up are empty, and last."""
    shares = share_out(lengths, num_ranks)
    cut = [cut_by_padded_tokens([lengths[i] for i in share], limit, boundary=boundary) for share in shares]
    mine = [[shares[rank][place] for place in group] for group in cut[rank]]
    return mine + [[] for _ in range(max(map(len, cut)) - len(mine))]


@dataclass(frozen=True)
class PaddedSequences:
    """Token sequences for one forward pass, and which of their tokens are to be predicted.

    B sequences, T padded length, N tokens to predict: those behind each prompt, sequence after sequence.
    """

    input_ids: torch.Tensor  # [B, T] int64, padded on the right
    positions: torch.Tensor  # [N] int64 into the B * T hidden states: those that predict token_ids
    token_ids: torch.Tensor  # [N] int64
    lengths: torch.Tensor  # [B] int64, without padding; of a row that only fills up, 1

    def to(self, device: torch.device) -> Self:
        tensors = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def pad_sequences(sequences: list[list[int]], prompt_lengths: list[int]) -> PaddedSequences:
    """Pad sequences on the right; each is a prompt of at least one token and the tokens to predict behind it. Of no sequence
    there is one row of padding, in which nothing is to be predicted."""
    longest = max(map(len, sequences), default=1)
    input_ids = np.full((max(1, len(sequences)), longest), _PAD_ID, np.int64)
    of_rows = [np.zeros(0, np.int64)]
    for row, (sequence, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        input_ids[row, : len(sequence)] = sequence
        of_rows.append(np.arange(prompt_length - 1, len(sequence) - 1) + row * longest)
    positions = np.concatenate(of_rows)
    lengths = np.array([len(sequence) for sequence in sequences] or [1], np.int64)
    columns = (input_ids, positions, input_ids.ravel()[positions + 1], lengths)
    return PaddedSequences(*map(torch.from_numpy, columns))
