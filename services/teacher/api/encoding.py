"""Scores as the bytes of an answer: JSON for people, safetensors for programs."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np

from services.wire.teacher import TeacherScores, encode_scores

# Copied in less time than it takes to wake another thread.
_SMALL_NUM_CANDIDATES = 8192


def as_dtype(scores: TeacherScores, dtype: str) -> TeacherScores:
    """Logprobs in `dtype`; one below the least float16 becomes that, for minus infinity would mean "impossible"."""
    if dtype == "float32":
        return scores
    least = np.finfo(dtype).min

    def narrowed(values: np.ndarray) -> np.ndarray:
        return np.where(np.isneginf(values), values, np.maximum(values, least)).astype(dtype)

    columns: dict[str, Any] = {n: narrowed(v) for n, v in scores.columns().items() if n.endswith("logprobs")}
    return replace(scores, **columns)


def as_json(scores: TeacherScores) -> dict[str, Any]:
    """The readable answer; JSON has no word for minus infinity (no mass outside the candidates) and NaN: both are null."""

    def listed(values: np.ndarray) -> list[Any]:
        if values.dtype.kind != "f" or np.isfinite(values).all():
            return values.tolist()
        return np.where(np.isfinite(values), values.astype(object), np.array(None)).tolist()

    columns, bounds = scores.columns(), zip(scores.row_offsets[:-1], scores.row_offsets[1:], strict=True)
    sequences = [{name: listed(values[start:end]) for name, values in columns.items()} for start, end in bounds]
    return {**scores.metadata(), "sequences": sequences}


async def encode_safetensors(scores: TeacherScores, dtype: str) -> bytes:
    narrowed = as_dtype(scores, dtype)
    if scores.topk_ids.size <= _SMALL_NUM_CANDIDATES:
        return encode_scores(narrowed)
    return await asyncio.to_thread(encode_scores, narrowed)


def encode_json(scores: TeacherScores) -> bytes:
    return json.dumps(as_json(scores), allow_nan=False, separators=(",", ":")).encode()
