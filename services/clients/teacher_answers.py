"""What answers of a teacher are checked for, and how the answers to pieces of the work become one."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from services.errors import PeerError
from services.wire.teacher import MODEL_DIGITS, TeacherInfo, TeacherScores

TokenIdsAndPromptLength = tuple[list[int], int]
"""(token ids of prompt and completion, number of them that are the prompt's), e.g. ([52, 55, 43, 56], 3)."""


Origin = TeacherInfo | TeacherScores
"""What says which model it is of."""


def replica_problem(first: tuple[str, Origin], other: tuple[str, Origin]) -> str | None:
    """What teachers do that are no replicas of one model, "do not ..."; None if they are.

    Args:
        first, other: the URL of a server and an answer of it.
    """
    (url, ours), (other_url, theirs) = first, other
    if ours.fingerprint == theirs.fingerprint:
        return None
    both = (
        f"{ours.model} ({ours.fingerprint}) answered from {url}, {theirs.model} ({theirs.fingerprint}) from {other_url}"
    )
    if ours.fingerprint[:MODEL_DIGITS] == theirs.fingerprint[:MODEL_DIGITS]:
        return f"do not compute their one model in the same way (engine, dtype or options): {both}"
    if isinstance(ours, TeacherInfo) and ours.server == "vllm":
        both += "; a plain vLLM server tells no more than a name: start replicas with the same --served-model-name"
    return f"do not serve the same model: {both}"


def first_replica_problem(urls: list[str], infos: list[TeacherInfo]) -> str | None:
    """Which teachers are no replicas of one model, and how; None if all are."""
    first, *others = zip(urls, infos, strict=True)
    found = next((problem for other in others if (problem := replica_problem(first, other))), None)
    return None if found is None else f"the teachers at {', '.join(urls)} {found}"


def check_answer(url: str, scores: TeacherScores, asked: list[dict[str, Any]], top_k: int, temperature: float) -> None:
    """Refuse an answer of other settings or shapes than were asked for; `mismatches` compares its tokens.

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


def mismatches(scores: TeacherScores, asked: Iterable[TokenIdsAndPromptLength | None]) -> dict[int, str]:
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


def join_scores(parts: list[tuple[list[int], TeacherScores]], num_sequences: int) -> TeacherScores:
    """One answer from the answers to parts of the work, which come from one model.

    Args:
        parts: the indices of the sequences of each, rising from part to part; indices that none of them has get no rows.
    """
    first = parts[0][1]
    lengths = np.zeros(num_sequences, np.int64)
    for indices, part in parts:
        lengths[indices] = np.diff(part.row_offsets)
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for _, part in parts]) for name in first.columns()
    }
    return replace(first, row_offsets=np.concatenate([[0], np.cumsum(lengths)]), **columns)


def without_sequences(scores: TeacherScores, indices: Iterable[int]) -> TeacherScores:
    """Scores of the other sequences; those at `indices` have no rows."""
    return replace(scores, row_offsets=np.delete(scores.row_offsets, [index + 1 for index in indices]))


def empty_scores(
    source: TeacherInfo | TeacherScores,
    temperature: float,
    top_k: int,
    *,
    num_sequences: int,
    support_width: int | None,
    logprob_dtype: np.dtype[Any],
) -> TeacherScores:
    """The answer in which no sequence has rows.

    Args:
        source: says which model refused them all.
        support_width: M of [R, M] support_logprobs; None: not asked for.
    """
    row, wide = np.zeros(0, logprob_dtype), np.zeros((0, top_k), logprob_dtype)
    return TeacherScores(
        model=source.model,
        fingerprint=source.fingerprint,
        temperature=temperature,
        top_k=top_k,
        row_offsets=np.zeros(num_sequences + 1, np.int64),
        token_ids=np.zeros(0, np.int32),
        token_logprobs=row,
        topk_ids=wide.astype(np.int32),
        topk_logprobs=wide,
        tail_logprobs=row,
        entropies=row.astype(np.float32),
        support_logprobs=None if support_width is None else np.zeros((0, support_width), logprob_dtype),
        support_tail_logprobs=None if support_width is None else row,
    )
