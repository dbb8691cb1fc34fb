"""How parameters are cut into buckets, packed and hashed."""

from typing import Any

import pytest
import torch
from blake3 import blake3
from vllm.distributed.weight_transfer.base import ParamMeta

from services.weight_transfer.buckets import Buffers, checksum, cut_into_buckets, describe, unpack
from services.weight_transfer.channel import Update

CPU = torch.device("cpu")


def parameters(*names: str) -> list[ParamMeta]:
    """Of 16 bytes each."""
    return [ParamMeta(name, torch.float32, (4,)) for name in names]


def cut(described: list[ParamMeta], bucket_bytes: int) -> list[list[str]]:
    return [[p.name for p in bucket.parameters] for bucket in cut_into_buckets(describe(described, bucket_bytes))]


LAYERS = parameters("embed", "layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k", "layers.2.q", "norm", "head")
OF_TEXT: Any = [["1"]]


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"),
    [
        (1, ["embed", "layers.0.q layers.0.k", "layers.1.q layers.1.k", "layers.2.q", "norm", "head"]),
        (47, ["embed", "layers.0.q layers.0.k", "layers.1.q layers.1.k", "layers.2.q norm", "head"]),
        (48, ["embed layers.0.q layers.0.k", "layers.1.q layers.1.k layers.2.q", "norm head"]),
        (64, ["embed layers.0.q layers.0.k", "layers.1.q layers.1.k layers.2.q norm", "head"]),
        (1000, ["embed layers.0.q layers.0.k layers.1.q layers.1.k layers.2.q norm head"]),
    ],
)
def test_a_bucket_holds_whole_layers_up_to_its_size(bucket_bytes: int, expected: list[str]) -> None:
    assert cut(LAYERS, bucket_bytes) == [bucket.split() for bucket in expected]


def test_the_experts_of_a_layer_stay_together() -> None:
    experts = parameters("layers.0.experts.0.up", "layers.0.experts.1.up", "layers.1.experts.0.up")
    assert cut(experts, 1) == [["layers.0.experts.0.up", "layers.0.experts.1.up"], ["layers.1.experts.0.up"]]


@pytest.mark.parametrize(
    ("update", "fault"),
    [
        (describe(parameters("layers.1.q", "layers.0.q"), 1), "layer by layer"),
        (describe(parameters("layers.0.q", "norm", "layers.0.k"), 1), "layer by layer"),
        (describe(parameters("a", "a"), 1), "twice"),
        (Update(["a"], ["floot32"], [[1]], 1), "a has the dtype 'floot32'"),
        (Update(["a"], ["nn"], [[1]], 1), "a has the dtype 'nn'"),
        (Update(["a"], ["float32"], [[-1]], 1), r"a has the shape \[-1\]"),
        (Update(["a"], ["float32"], OF_TEXT, 1), r"a has the shape \['1'\]"),
        (Update(["a", "b"], ["float32"], [[1], [1]], 1), "shorter"),
    ],
)
def test_an_update_that_no_trainer_sends_is_refused(update: Update, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        cut_into_buckets(update)


def test_what_is_packed_is_unpacked_whatever_its_dtype() -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),  # 14 bytes: what follows would not be aligned
        "c": torch.arange(5),
        "d": torch.tensor(2.5),
        "e": torch.empty(0, 3),
    }
    (bucket,) = cut_into_buckets(describe([ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], 1000))
    buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    for (_, place), tensor in zip(unpack(buffer, bucket), tensors.values(), strict=True):
        place.copy_(tensor)
    found = dict(unpack(buffer, bucket))
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)


def test_a_checksum_is_blake3_of_the_bytes() -> None:
    first, second = torch.randn(3).bfloat16(), torch.arange(4)
    expected = blake3(first.view(torch.uint8).numpy().tobytes() + second.numpy().tobytes()).hexdigest()
    assert checksum([first, second]) == expected


def test_a_checksum_of_several_pieces_sees_the_last_byte() -> None:
    large = torch.zeros((16 << 20) + 1, dtype=torch.uint8)
    before = checksum([large])
    large[-1] = 1
    assert checksum([large]) != before


def test_two_buffers_take_turns_and_are_kept() -> None:
    buckets = cut_into_buckets(describe(LAYERS, 1))
    buffers = Buffers(CPU)
    buffers.reserve(buckets)
    addresses = [buffers.of(index, bucket).data_ptr() for index, bucket in enumerate(buckets)]
    assert addresses == [addresses[0], addresses[1]] * 3 and addresses[0] != addresses[1]
    buffers.reserve(buckets)
    assert buffers.of(0, buckets[0]).data_ptr() == addresses[0]


def test_only_the_buffer_that_takes_a_large_parameter_is_large() -> None:
    large = ParamMeta("embed", torch.float32, (1000,))
    buffers = Buffers(CPU)
    buffers.reserve(cut_into_buckets(describe([large, *LAYERS[1:]], 1)))
    assert [memory.numel() for memory in buffers._memory] == [4000, 32]
