"""What scripted servers answer to the clients, worked out from what was asked."""

import json
from typing import Any

import httpx
import numpy as np

from services.wire.frames import END_OF_STREAM
from services.wire.rollout import RolloutCompletion, VersionSpan, encode_completion
from services.wire.teacher import TeacherScores, encode_scores


def scores_for(body: dict[str, Any], **changes: Any) -> TeacherScores:
    """Rows that can be told apart: log-probabilities and tails are minus the scored ids, those of support ids minus these."""
    completions = [s["token_ids"][s["prompt_length"] :] for s in body["sequences"]]
    tokens = np.concatenate(completions).astype(np.float32)
    support = [row for s in body["sequences"] for row in s.get("support_ids", [])]
    fields: dict[str, Any] = {
        "model": "m",
        "fingerprint": "f",
        "temperature": body["temperature"],
        "top_k": body["top_k"],
        "row_offsets": np.cumsum([0, *map(len, completions)]),
        "token_ids": tokens.astype(np.int32),
        "token_logprobs": -tokens,
        "topk_ids": np.tile(tokens.astype(np.int32)[:, None], (1, body["top_k"])),
        "topk_logprobs": np.zeros((len(tokens), body["top_k"]), np.float32),
        "tail_logprobs": -tokens,
        "entropies": tokens,
        "support_logprobs": -np.array(support, np.float32) if support else None,
        "support_tail_logprobs": -tokens if support else None,
    }
    return TeacherScores(**{**fields, **changes})


def scored(request: httpx.Request, **changes: Any) -> httpx.Response:
    """A teacher's answer."""
    return httpx.Response(200, content=encode_scores(scores_for(json.loads(request.content), **changes)))


def frame(prompt_index: int, sample_index: int, *token_ids: int, version: str = "default") -> bytes:
    """One completion, certain of each of its tokens."""
    ids, logprobs = np.array(token_ids, np.int32), np.zeros(len(token_ids), np.float32)
    spans = [VersionSpan(version, 0, len(token_ids))]
    return encode_completion(RolloutCompletion(prompt_index, sample_index, ids, logprobs, "stop", spans))


def frames_for(request: httpx.Request, version: str = "default") -> list[bytes]:
    """Each prompt completed with its own first id and the seed of the sample, the last completion first."""
    body = json.loads(request.content)
    seed, samples = body["sampling"].get("seed") or 0, range(body.get("samples_per_prompt", 1))
    prompts = list(enumerate(body["prompts"]))
    return [frame(i, s, prompt[0], seed + s, version=version) for i, prompt in prompts for s in samples][::-1]


def completed(request: httpx.Request, version: str = "default") -> httpx.Response:
    """A rollout server's answer."""
    return httpx.Response(200, content=b"".join([*frames_for(request, version), END_OF_STREAM]))
