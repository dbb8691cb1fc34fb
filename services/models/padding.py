"""Sequences to padded rows, and where in them completion tokens are predicted; for the teacher and the trainer.

Rows, not packed sequences: sdpa has no variable-length path and would build a dense mask over a packed batch.
"""

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


def pad_rows(sequences: list[list[int]]) -> torch.Tensor:
    """[B, T] token ids, padded on the right."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), _PAD_ID, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return ids


def predicting_positions(prompt_lengths: list[int], completion_lengths: list[int], padded_length: int) -> torch.Tensor:
    """[N] indices into the flattened [B * T] hidden states: those whose next token is a completion token."""
    rows = [
        np.arange(length) + (row * padded_length + prompt - 1)
        for row, (prompt, length) in enumerate(zip(prompt_lengths, completion_lengths, strict=True))
    ]
    return torch.from_numpy(np.concatenate(rows))
