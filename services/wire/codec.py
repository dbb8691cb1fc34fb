"""The binary codec of both servers: safetensors documents, alone or as length-prefixed frames of a stream.

Nothing here unpickles. A frame is a little-endian uint32 byte count followed by that many bytes of one
safetensors document; a stream ends with a frame of zero bytes, so a reader can tell a finished stream
from a broken one. While there is nothing to send, a count of 2^32 - 1 without a document says that the server lives.
"""

import json
import struct
from collections.abc import AsyncIterator
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from services.errors import PeerError
from services.wire.schemas import PROTOCOL_VERSION, RolloutCompletion, TeacherScores, VersionSpan

SAFETENSORS_MEDIA_TYPE = "application/x-safetensors"
FRAMES_MEDIA_TYPE = "application/x-safetensors-frames"
END_OF_STREAM = struct.pack("<I", 0)
HEARTBEAT = struct.pack("<I", (1 << 32) - 1)
MAX_IDS_PER_REQUEST = 1 << 20
"""Token ids that a client sends in one request for rollouts, and a server reads without keeping others waiting."""

_PREFIX = struct.Struct("<I")
_HEADER = struct.Struct("<Q")
_MAX_FRAME_BYTES = 1 << 30
_SCORE_FIELDS = frozenset(field.name for field in fields(TeacherScores))


def encode_document(arrays: dict[str, np.ndarray | None], metadata: dict[str, Any]) -> bytes:
    """One safetensors document; absent arrays are left out, metadata values are stored as JSON."""
    present = {name: np.asarray(array, order="C") for name, array in arrays.items() if array is not None}
    return save(present, metadata={name: json.dumps(value) for name, value in metadata.items()})


def decode_document(document: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Inverse of `encode_document`.

    Raises:
        PeerError: the bytes are not a safetensors document.
    """
    try:
        arrays = load(document)
        (header_bytes,) = _HEADER.unpack_from(document)
        header = json.loads(document[_HEADER.size : _HEADER.size + header_bytes])
        metadata = {name: json.loads(value) for name, value in header.get("__metadata__", {}).items()}
    except (SafetensorError, ValueError, struct.error, KeyError) as error:
        raise PeerError(f"the answer is not a safetensors document: {error}") from error
    return arrays, metadata


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
    return _PREFIX.pack(len(document)) + document


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
    return _PREFIX.pack(len(document)) + document


async def read_frames(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Cut a byte stream into documents; heartbeats are left out.

    Raises:
        PeerError: the stream broke off before its end mark, or a frame is absurdly large.
    """
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= _PREFIX.size:
            if buffer.startswith(HEARTBEAT):
                del buffer[: _PREFIX.size]
                continue
            (size,) = _PREFIX.unpack_from(buffer)
            if size == 0:
                return
            if size > _MAX_FRAME_BYTES:
                raise PeerError(f"a frame of {size} bytes announced, more than {_MAX_FRAME_BYTES} are never sent")
            if len(buffer) < _PREFIX.size + size:
                break
            yield bytes(buffer[_PREFIX.size : _PREFIX.size + size])
            del buffer[: _PREFIX.size + size]
    raise PeerError("the stream broke off before its end mark")


def encode_scores(scores: TeacherScores) -> bytes:
    """The binary answer of `POST /v1/teacher/logprobs`."""
    return encode_document({"row_offsets": scores.row_offsets, **scores.columns()}, scores.metadata())


def decode_scores(document: bytes) -> TeacherScores:
    """Inverse of `encode_scores`; names that a later server added are left out.

    Raises:
        PeerError: the document is not an answer of protocol 1.
    """
    arrays, metadata = decode_document(document)
    protocol = metadata.pop("protocol", None)
    if protocol != PROTOCOL_VERSION:
        raise PeerError(f"the teacher answered in protocol {protocol!r}, this client speaks {PROTOCOL_VERSION}")
    try:
        known: dict[str, Any] = {name: value for name, value in {**arrays, **metadata}.items() if name in _SCORE_FIELDS}
        return TeacherScores(**known)
    except TypeError as error:
        raise PeerError(f"the answer lacks fields: {error}") from error
