"""What answers of a teacher are checked for, and how the answers to pieces of the work become one."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from services.errors import PeerError
from services.schemas import TeacherScores

Sequence = tuple[list[int], int]
"""Token ids of prompt and completion, and the prompt's length."""


def cut_by_rows(num_rows: list[int], limit: int) -> list[slice]:
    """Consecutive slices of sequences with at most `limit` rows each; a longer sequence stands alone."""
    slices, start, rows = [], 0, 0
    for index, count in enumerate(num_rows):
        if index > start and rows + count > limit:
            slices.append(slice(start, index))
            start, rows = index, 0
        rows += count
    return [*slices, slice(start, len(num_rows))]


def check_answer(url: str, scores: TeacherScores, asked: list[dict[str, Any]], top_k: int, temperature: float) -> None:
    """Refuse an answer that contradicts itself or answers another request; its sequences are `mismatches`' business.

    Raises:
        PeerError: names the server and what is wrong.
    """
    if (scores.top_k, scores.temperature) != (top_k, temperature):
        raise PeerError(
            f"{url} scored with top_k = {scores.top_k}, temperature = {scores.temperature}, asked for {top_k}, {temperature}"
        )
    offsets = scores.row_offsets
    if offsets.shape != (len(asked) + 1,) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise PeerError(f"{url} sent row_offsets of shape {offsets.shape} that do not part {len(asked)} sequences")
    total = int(offsets[-1])
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("token_ids", "token_logprobs", "tail_logprobs", "entropies"), (total,)
    )
    shapes |= dict.fromkeys(("topk_ids", "topk_logprobs"), (total, top_k))
    if (support := asked[0].get("support_ids")) is not None:
        shapes |= {"support_logprobs": (total, len(support[0])), "support_tail_logprobs": (total,)}
    for name, shape in shapes.items():
        array = getattr(scores, name)
        if array is None or array.shape != shape:
            raise PeerError(f"{url} sent {name} of shape {None if array is None else array.shape}, expected {shape}")


def mismatches(scores: TeacherScores, asked: Iterable[Sequence | None]) -> dict[int, str]:
    """Reason by index of the sequences whose rows are not those of the tokens that were asked about.

    A row is of another token where a server lost, shifted or mixed up rows.

    Args:
        asked: None for a text, of whose rows only the presence can be seen.
    """
    found = {}
    for index, sequence in enumerate(asked):
        scored = scores.token_ids[scores.row_offsets[index] : scores.row_offsets[index + 1]]
        if sequence is None:
            if len(scored) == 0:
                found[index] = "the teacher scored none of its tokens"
            continue
        token_ids, prompt_length = sequence
        expected = np.asarray(token_ids[prompt_length:])
        if len(scored) != len(expected):
            found[index] = f"the teacher scored {len(scored)} of {len(expected)} tokens"
        elif (wrong := scored != expected).any():
            row = int(wrong.argmax())
            found[index] = f"the teacher scored token {scored[row]} in row {row}, asked was {expected[row]}"
    return found


def concatenate_scores(parts: list[TeacherScores]) -> TeacherScores:
    """One answer from the answers to consecutive slices, which come from one model."""
    first = parts[0]
    if len(parts) == 1:
        return first
    lengths = np.concatenate([np.diff(part.row_offsets) for part in parts])
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in first.columns()
    }
    return replace(first, row_offsets=np.concatenate([[0], np.cumsum(lengths)]), **columns)
