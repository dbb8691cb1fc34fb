"""The binary codec: what goes in comes out bit by bit, and anything else is refused as a PeerError."""

import json
import struct
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError

from services.errors import PeerError
from services.wire.batch import TrainingBatch, decode_batch, encode_batch
from services.wire.document import decode_document, encode_document
from services.wire.frames import END_OF_STREAM, HEARTBEAT, read_frames
from services.wire.rollout import (
    RolloutCompletion,
    VersionSpan,
    decode_completion,
    encode_completion,
    encode_stream_error,
)
from services.wire.teacher import TeacherScores, decode_scores, encode_scores

FLOATS = hnp.arrays(np.float32, st.integers(0, 6), elements=st.floats(width=32, allow_nan=True))


async def chunked(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def frames_of(*chunks: bytes) -> list[bytes]:
    return [frame async for frame in read_frames(chunked(*chunks))]


def cut(content: bytes, sizes: Iterable[int]) -> list[bytes]:
    """`content` in pieces of the given sizes and a last piece."""
    pieces = []
    for size in sizes:
        pieces.append(content[:size])
        content = content[size:]
    return [*pieces, content]


def completion(**changes: Any) -> RolloutCompletion:
    fields: dict[str, Any] = {
        "prompt_index": 3,
        "sample_index": 1,
        "token_ids": np.array([5, 6, 7], np.int32),
        "rollout_logprobs": np.array([-0.5, -1.5, -0.25], np.float32),
        "finish_reason": "length",
        "policy_versions": [VersionSpan("default", 0, 2), VersionSpan("run:7", 2, 3)],
    }
    return RolloutCompletion(**{**fields, **changes})


def scores(**changes: Any) -> TeacherScores:
    fields: dict[str, Any] = {
        "model": "some/teacher",
        "fingerprint": "0123abcd",
        "temperature": 0.5,
        "top_k": 2,
        "row_offsets": np.array([0, 1, 3], np.int64),
        "token_ids": np.array([1, 4, 6], np.int32),
        "token_logprobs": np.array([-1.0, -2.0, -3.0], np.float32),
        "topk_ids": np.array([[1, 2], [3, 4], [5, 6]], np.int32),
        "topk_logprobs": np.array([[-0.1, -3], [-0.2, -4], [-0.3, -5]], np.float32),
        "tail_logprobs": np.array([-np.inf, -2.0, -1.0], np.float32),
        "entropies": np.array([0.1, 0.2, 0.3], np.float32),
    }
    return TeacherScores(**{**fields, **changes})


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal fields, arrays bit by bit and of the same dtype."""
    assert vars(ours).keys() == vars(theirs).keys()
    for name, value in vars(ours).items():
        other = getattr(theirs, name)
        if isinstance(value, np.ndarray):
            assert (value.dtype, value.shape) == (other.dtype, other.shape), name
            assert value.tobytes() == other.tobytes(), name
        else:
            assert value == other, name


@given(
    arrays=st.dictionaries(
        st.text("abcdefgh_", min_size=1, max_size=8),
        hnp.arrays(
            st.sampled_from([np.float32, np.float16, np.int32, np.int64, np.uint8]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        ),
        max_size=4,
    ),
    metadata=st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8),
            lambda children: st.lists(children, max_size=3),
        ),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=60, deadline=None)
def test_a_document_gives_back_arrays_and_metadata(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    got_arrays, got_metadata = decode_document(encode_document(arrays, metadata))
    assert got_metadata == metadata
    assert got_arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (got_arrays[name].dtype, got_arrays[name].shape) == (array.dtype, array.shape)
        assert got_arrays[name].tobytes() == array.tobytes()


def test_a_view_is_stored_in_the_order_of_its_elements() -> None:
    columns = np.arange(6, dtype=np.float32).reshape(2, 3).T[::-1]
    arrays, _ = decode_document(encode_document({"columns": columns}, {}))
    assert arrays["columns"].tolist() == [[2.0, 5.0], [1.0, 4.0], [0.0, 3.0]]


@given(logprobs=FLOATS, top_k=st.integers(0, 3), prompt_index=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_a_completion_survives_the_wire(logprobs: np.ndarray, top_k: int, prompt_index: int) -> None:
    count = len(logprobs)
    sent = completion(
        prompt_index=prompt_index,
        token_ids=np.arange(count, dtype=np.int32),
        rollout_logprobs=logprobs,
        student_topk_ids=np.full((count, top_k), 9, np.int32) if top_k else None,
        student_topk_logprobs=np.full((count, top_k), -np.inf, np.float32) if top_k else None,
    )
    frame = encode_completion(sent)
    assert struct.unpack("<I", frame[:4]) == (len(frame) - 4,)
    assert_same(sent, decode_completion(frame[4:]))


@given(token_logprobs=FLOATS, width=st.integers(1, 3), support=st.booleans())
@settings(max_examples=60, deadline=None)
def test_scores_survive_the_wire(token_logprobs: np.ndarray, width: int, support: bool) -> None:
    rows = len(token_logprobs)
    sent = scores(
        row_offsets=np.array([0, rows], np.int64),
        token_logprobs=token_logprobs,
        topk_ids=np.ones((rows, width), np.int32),
        topk_logprobs=np.full((rows, width), -0.5, np.float32),
        tail_logprobs=-token_logprobs,
        entropies=token_logprobs,
        support_logprobs=np.full((rows, 2), -7, np.float32) if support else None,
        support_tail_logprobs=np.full(rows, -np.inf, np.float32) if support else None,
    )
    assert_same(sent, decode_scores(encode_scores(sent)))


def test_half_precision_scores_keep_their_dtype() -> None:
    sent = scores(token_logprobs=np.array([-1, -2, -3], np.float16))
    assert decode_scores(encode_scores(sent)).token_logprobs.dtype == np.float16


@given(sizes=st.lists(st.integers(0, 40), max_size=20), bodies=st.lists(st.binary(min_size=1, max_size=30), max_size=5))
@settings(max_examples=80, deadline=None)
async def test_frames_do_not_depend_on_how_the_stream_is_cut(sizes: list[int], bodies: list[bytes]) -> None:
    stream = b"".join(struct.pack("<I", len(body)) + body for body in bodies) + END_OF_STREAM
    assert await frames_of(*cut(stream, sizes)) == bodies


async def test_what_follows_the_end_mark_is_not_read() -> None:
    assert await frames_of(b"\x01\0\0\0a" + END_OF_STREAM + b"\x01\0\0\0b") == [b"a"]


@pytest.mark.parametrize("length", [0, 2, 4, 7, 8, 12])
async def test_a_stream_that_breaks_off_is_an_error(length: int) -> None:
    stream = b"\x04\0\0\0abcd" + b"\x04\0\0\0efgh"
    with pytest.raises(PeerError, match="broke off before its end mark"):
        await frames_of(stream[:length])


async def test_frames_before_a_break_have_been_handed_out() -> None:
    seen = []
    with pytest.raises(PeerError):
        async for frame in read_frames(chunked(b"\x04\0\0\0abcd", b"\x04\0\0\0ef")):
            seen.append(frame)
    assert seen == [b"abcd"]


async def test_an_absurd_frame_is_refused_by_its_prefix_alone() -> None:
    with pytest.raises(PeerError, match=f"{2**30 + 1} bytes announced"):
        await frames_of(struct.pack("<I", 2**30 + 1))


async def test_the_largest_frame_is_waited_for() -> None:
    with pytest.raises(PeerError, match="broke off"):
        await frames_of(struct.pack("<I", 2**30))


def test_an_error_frame_raises_what_the_server_said() -> None:
    frame = encode_stream_error('the engine died: 你好 "quoted"')
    with pytest.raises(PeerError, match='failed in mid-stream: the engine died: 你好 "quoted"'):
        decode_completion(frame[4:])


def document_with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\0" * 7,
        b"<html>Bad gateway</html>",
        struct.pack("<Q", 2**63) + b"{}",
        document_with_header(b"{"),
        document_with_header(b"[]"),
        document_with_header(b'{"__metadata__": {"top_k": "not JSON"}}'),
        document_with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
        document_with_header(b'{"a": {"dtype": "F99", "shape": [0], "data_offsets": [0, 0]}}'),
        encode_scores(scores())[:-1],
    ],
)
def test_what_is_no_document_is_refused(document: bytes) -> None:
    with pytest.raises(PeerError, match="not a safetensors document"):
        decode_document(document)


@pytest.mark.parametrize("protocol", [None, 0, 2, "1"])
def test_scores_in_another_protocol_are_refused(protocol: Any) -> None:
    metadata = {"model": "m", "fingerprint": "f", "temperature": 1.0, "top_k": 2}
    if protocol is not None:
        metadata["protocol"] = protocol
    with pytest.raises(PeerError, match=f"protocol {protocol!r}, this client speaks 1"):
        decode_scores(encode_document({}, metadata))


@pytest.mark.parametrize("missing", ["token_logprobs", "token_ids", "model"])
def test_scores_that_lack_a_field_are_refused(missing: str) -> None:
    arrays, metadata = decode_document(encode_scores(scores()))
    arrays.pop(missing, None)
    metadata.pop(missing, None)
    with pytest.raises(PeerError, match=f"lacks fields: .*{missing}"):
        decode_scores(encode_document(arrays, metadata))


def test_what_a_later_server_adds_to_its_scores_is_left_out() -> None:
    arrays, metadata = decode_document(encode_scores(scores()))
    later = encode_document({**arrays, "surprise": np.zeros(1, np.float32)}, {**metadata, "wonder": 1})
    assert_same(decode_scores(later), scores())


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": None},
        {"finish_reason": None},
        {"policy_versions": None},
        {"policy_versions": [1]},
        {"policy_versions": [{"policy_version": "a"}]},
        {"policy_versions": [{"policy_version": ["a"], "start": 0, "end": 3}]},
        {"policy_versions": [{"policy_version": "a", "start": "0", "end": 3}]},
        {"policy_versions": [{"policy_version": "a", "start": 0, "end": None}]},
        {"finish_reason": "tired"},
        {"prompt_index": "0"},
        {"sample_index": 0.5},
        {"surprise": 1},
    ],
    ids=json.dumps,
)
def test_a_frame_that_is_no_completion_is_refused(change: dict[str, Any]) -> None:
    arrays, metadata = decode_document(encode_completion(completion())[4:])
    for name, value in change.items():
        if value is None:
            arrays.pop(name, None)
            metadata.pop(name, None)
        else:
            metadata[name] = value
    with pytest.raises(PeerError, match="not a rollout completion"):
        decode_completion(encode_document(arrays, metadata))


@pytest.mark.parametrize("name", ["token_ids", "rollout_logprobs"])
@pytest.mark.parametrize("wrong", [np.array(1), np.zeros((3, 1)), np.zeros(3, np.complex64), np.zeros(3, bool)])
def test_arrays_of_another_kind_are_refused(name: str, wrong: np.ndarray) -> None:
    arrays, metadata = decode_document(encode_completion(completion())[4:])
    with pytest.raises(PeerError, match=f"its {name} is not what it should be"):
        decode_completion(encode_document({**arrays, name: wrong}, metadata))


def test_python_objects_cannot_be_sent() -> None:
    with pytest.raises(SafetensorError, match="object"):
        encode_document({"objects": np.array([{"a": 1}])}, {})


async def test_heartbeats_are_no_documents() -> None:
    stream = HEARTBEAT + b"\x01\0\0\0a" + HEARTBEAT * 2 + b"\x01\0\0\0b" + HEARTBEAT
    for size in range(1, 6):
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert await frames_of(*pieces, END_OF_STREAM) == [b"a", b"b"]
    with pytest.raises(PeerError, match="broke off"):
        await frames_of(stream)


def training_batch(**columns: Any) -> TrainingBatch:
    """Two completions of 2 and 1 tokens after prompts of 1 and 2, with candidates."""
    given: dict[str, Any] = {
        "rows": np.array([7, 7]),
        "groups": np.array([0, 1]),
        "prompt_lengths": np.array([1, 2]),
        "completion_lengths": np.array([2, 1]),
        "truncated": np.array([False, True]),
        "policy_versions": np.array([3, 4]),
        "prompt_ids": np.array([10, 20, 21], np.int32),
        "token_ids": np.array([11, 12, 22], np.int32),
        "rollout_logprobs": np.array([-1.0, -2.0, -3.0], np.float32),
        "teacher_token_logprobs": np.array([-4.0, -5.0, -6.0], np.float32),
        "support_ids": np.array([[1, 2], [3, 4], [5, 6]], np.int32),
        "teacher_support_logprobs": np.full((3, 2), -1.5, np.float32),
        "teacher_tail_logprob": np.array([-7.0, -np.inf, -9.0], np.float32),
        "texts": ["a", "你好"],
        "metrics": {"rollout_s": 0.25},
    }
    return TrainingBatch(**given | columns)


def test_a_batch_survives_and_its_sequences_are_where_they_were() -> None:
    sent = training_batch()
    got = decode_batch(encode_batch(sent))
    assert_same(sent, got)
    assert [got.prompt(index).tolist() for index in range(len(got))] == [[10], [20, 21]]
    assert [got.token_ids[got.completion(index)].tolist() for index in range(len(got))] == [[11, 12], [22]]
    assert got.truncated.dtype == np.bool_


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"rollout_logprobs": np.zeros(2, np.float32)}, "holds 2 rollout_logprobs for 3"),
        ({"groups": np.zeros(3, np.int64)}, "holds 3 groups for 2"),
        ({"prompt_lengths": np.array([1, 1])}, "holds 3 prompt_ids, its prompt_lengths come to 2"),
        ({"completion_lengths": np.array([2, 2])}, "holds 3 token_ids, its completion_lengths come to 4"),
        ({"support_ids": None}, "support_ids are missing"),
    ],
)
def test_a_batch_whose_columns_do_not_fit_is_refused(columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(PeerError, match=reason):
        decode_batch(encode_batch(training_batch(**columns)))
