"""What the rollout server is asked for, and what it answers."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from services.errors import PeerError
from services.wire.document import decode_document, encode_document
from services.wire.frames import frame
from services.wire.message import TokenIds, WireModel
from services.wire.policy_label import RunId

MAX_IDS_PER_REQUEST = 1 << 20
"""Token ids that a client sends in one request for rollouts, and a server reads without keeping others waiting."""


class RolloutSampling(WireModel):
    """How to complete; temperature 0 is greedy."""

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = None
    """Seed of this request's completions; without it the server's own sampler state is used."""


class RolloutRequest(WireModel):
    """`POST /v1/rollouts`: a batch of prompts, completed `samples_per_prompt` times each."""

    prompts: Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(fail_fast=True)] = Field(min_length=1)
    """Token ids of each prompt."""
    samples_per_prompt: int = Field(1, ge=1)
    sampling: RolloutSampling
    student_top_k: int = Field(0, ge=0)
    """Also return the student's k likeliest tokens at every position; 0 is off."""
    run: RunId | None = None
    """The run that wants to train on them: refused (409) unless it holds the server. Without one anybody may sample."""


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled under `policy_version`, a PolicyLabel ("default": never pushed to)."""

    policy_version: str
    start: int
    end: int


@dataclass(frozen=True)
class RolloutCompletion:
    """One frame of the answer of `POST /v1/rollouts`; T is the number of sampled tokens."""

    prompt_index: int
    sample_index: int
    token_ids: np.ndarray  # [T] int32, the sampled tokens, the end token included
    rollout_logprobs: np.ndarray  # [T] float32, logprob of token_ids under the policy that sampled
    finish_reason: Literal["stop", "length", "abort"]
    policy_versions: list[VersionSpan]
    student_topk_ids: np.ndarray | None = None  # [T, K] int32, without the appended sampled token
    student_topk_logprobs: np.ndarray | None = None  # [T, K] float32

    @property
    def truncated(self) -> bool:
        """Whether the completion hit max_new_tokens instead of ending by itself."""
        return self.finish_reason == "length"


class RolloutInfo(WireModel):
    """`GET /v1/rollouts/info`: what a trainer must know before it attaches."""

    protocol: int
    model: str
    boot_id: str
    """New at every start of the server, so that a restart is recognised."""
    policy_version: str
    """A PolicyLabel; "default" until the first push."""
    dtype: Literal["float32", "bfloat16", "float16"]
    max_model_len: int = Field(ge=2)
    vocab_size: int = Field(ge=1)
    max_logprobs: int
    world_size: int = Field(ge=1)
    """Processes that receive weights: tensor x pipeline x data parallel."""
    weight_transfer_backend: str
    gpu_uuids: list[str] = []
    """Of the cards it runs on, e.g. "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"; none on a CPU."""
    max_completions_per_request: int = Field(8192, ge=1)
    """Largest prompts times samples of one request."""


def encode_completion(completion: RolloutCompletion) -> bytes:
    """One frame of a rollout stream, length prefix included."""
    document = encode_document(
        {
            "token_ids": completion.token_ids,
            "rollout_logprobs": completion.rollout_logprobs,
            "student_topk_ids": completion.student_topk_ids,
            "student_topk_logprobs": completion.student_topk_logprobs,
        },
        {
            "prompt_index": completion.prompt_index,
            "sample_index": completion.sample_index,
            "finish_reason": completion.finish_reason,
            "policy_versions": [asdict(span) for span in completion.policy_versions],
        },
    )
    return frame(document)


def decode_completion(document: bytes) -> RolloutCompletion:
    """Inverse of `encode_completion`, without the length prefix.

    Raises:
        PeerError: not a completion, or the server reports that the stream failed.
    """
    arrays, metadata = decode_document(document)
    if "error" in metadata:
        raise PeerError(f"the rollout server failed in mid-stream: {metadata['error']}")
    try:
        spans = [VersionSpan(**span) for span in metadata.pop("policy_versions")]
        others: dict[str, Any] = {**arrays, **metadata}
        completion = RolloutCompletion(**others, policy_versions=spans)
    except (KeyError, TypeError) as error:
        raise PeerError(f"the frame is not a rollout completion: {error}") from error
    if (wrong := _wrong_field(completion)) is not None:
        raise PeerError(f"the frame is not a rollout completion: its {wrong} is not what it should be")
    return completion


def _wrong_field(completion: RolloutCompletion) -> str | None:
    """The first field that has another type than it says, or None."""
    ids, logprobs = completion.token_ids, completion.rollout_logprobs
    spans = completion.policy_versions
    checks = {
        "prompt_index": isinstance(completion.prompt_index, int),
        "sample_index": isinstance(completion.sample_index, int),
        "finish_reason": completion.finish_reason in ("stop", "length", "abort"),
        "token_ids": ids.ndim == 1 and ids.dtype.kind in "iu",
        "rollout_logprobs": logprobs.ndim == 1 and logprobs.dtype.kind == "f",
        "policy_versions": all(
            isinstance(s.policy_version, str) and isinstance(s.start, int) and isinstance(s.end, int) for s in spans
        ),
    }
    return next((name for name, is_right in checks.items() if not is_right), None)


def encode_stream_error(message: str) -> bytes:
    """The frame that tells a reader why a stream ends early."""
    document = encode_document({}, {"error": message})
    return frame(document)
