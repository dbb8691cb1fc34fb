"""The bytes of a push: parameters cut into buckets, packed, hashed and unpacked.

Both ends cut the same `Update` into the same buckets, so no sizes travel. A bucket holds whole decoder layers, as many as
fit into `bucket_bytes` and at least one: vLLM keeps references to the tensors of a layer that is not complete, and a
receive buffer can be used again only when it keeps none. A parameter outside the layers, such as an embedding, may stand
in any bucket, alone when it is larger.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from vllm.distributed.weight_transfer.base import ParamMeta, layerwise_groups

from services.weight_transfer.channel import Update

_ALIGNMENT = 16
"""Bytes; each parameter starts at a multiple of it, so that it is a view of the buffer whatever its dtype."""
_THREADS = max(1, (os.cpu_count() or 1) // 4)
"""Of a checksum: beside it a worker loads, and the trainer packs."""
_HASHED_AT_ONCE = 16 << 20
"""Bytes; a tensor of another device is hashed in pieces, so that no copy of all of it is needed."""


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel in one broadcast.

    Attributes:
        offsets: byte in the buffer at which each parameter starts.
        num_bytes: size of the buffer.
    """

    parameters: list[ParamMeta]
    offsets: list[int]
    num_bytes: int


def describe(parameters: Sequence[ParamMeta], bucket_bytes: int) -> Update:
    """What the workers are told of a push of these parameters."""
    return Update(
        names=[p.name for p in parameters],
        dtype_names=[str(p.dtype).removeprefix("torch.") for p in parameters],
        shapes=[list(p.shape) for p in parameters],
        bucket_bytes=bucket_bytes,
    )


def cut_into_buckets(update: Update) -> list[Bucket]:
    """The buckets of an update.

    Raises:
        ValueError: the update describes no weights that a trainer would send.
    """
    parameters = {p.name: p for p in _parameters(update)}
    buckets: list[list[ParamMeta]] = []
    room = 0
    for unit in _units(update.names):
        size = sum(_aligned(num_bytes(parameters[name])) for name in unit)
        if size > room:
            buckets.append([])
            room = update.bucket_bytes
        buckets[-1] += [parameters[name] for name in unit]
        room -= size
    return [_lay_out(bucket) for bucket in buckets]


def _units(names: list[str]) -> list[list[str]]:
    """Decoder layers, and each parameter outside of them: what must not be divided among two buckets."""
    units: list[list[str]] = []
    for group in layerwise_groups(names):
        in_layer = any(part.isdigit() for part in group[0].split("."))
        units += [group] if in_layer else [[name] for name in group]
    if [name for unit in units for name in unit] != names:
        raise ValueError("the parameters of an update must come layer by layer, in the order of the layers")
    return units


def _parameters(update: Update) -> list[ParamMeta]:
    if len(set(update.names)) != len(update.names):
        raise ValueError("an update names a parameter twice")
    parameters = []
    for name, dtype_name, shape in zip(update.names, update.dtype_names, update.shapes, strict=True):
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} has the dtype {dtype_name!r}, which torch does not know")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"{name} has the shape {shape!r}; sizes are whole numbers from 0")
        parameters.append(ParamMeta(name, dtype, tuple(shape)))
    return parameters


def _lay_out(parameters: list[ParamMeta]) -> Bucket:
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(end)
        end += _aligned(num_bytes(parameter))
    # A lone parameter has no padding after it, so that its own memory can be sent as it is.
    return Bucket(parameters, offsets, num_bytes(parameters[0]) if len(parameters) == 1 else end)


def num_bytes(parameter: ParamMeta) -> int:
    return math.prod(parameter.shape) * parameter.dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def unpack(buffer: torch.Tensor, bucket: Bucket) -> list[tuple[str, torch.Tensor]]:
    """(name, view of the buffer) of each parameter: valid until the buffer is used again."""
    tensors = []
    for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=True):
        flat = buffer[offset : offset + num_bytes(parameter)]
        tensors.append((parameter.name, flat.view(parameter.dtype).view(parameter.shape)))
    return tensors


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[num bytes] uint8 view of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8)


def checksum(tensors: Iterable[torch.Tensor]) -> str:
    """Blake3 of the bytes of contiguous tensors, one after the other, in hexadecimal."""
    hasher = blake3(max_threads=_THREADS)
    for tensor in tensors:
        for piece in as_bytes(tensor).split(_HASHED_AT_ONCE):
            hasher.update(piece.cpu().numpy())
    return hasher.hexdigest()


class Buffers:
    """Two buffers that the buckets of a push use in turn, kept from one push to the next.

    A new buffer costs a page fault for every 4 kB of it, which is more than the copy into it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = [torch.empty(0, dtype=torch.uint8, device=device)] * 2

    def reserve(self, buckets: Sequence[Bucket]) -> None:
        """Make room for all buckets; each of the two grows to the largest of its own."""
        for turn in range(2):
            size = max((bucket.num_bytes for bucket in buckets[turn::2]), default=0)
            if self._memory[turn].numel() < size:
                self._memory[turn] = torch.empty(0)  # the old one is freed before the new one is made
                self._memory[turn] = torch.empty(size, dtype=torch.uint8, device=self._device)

    def of(self, index: int, bucket: Bucket) -> torch.Tensor:
        """[bucket.num_bytes] uint8, which the bucket after the next will use again."""
        return self._memory[index % 2][: bucket.num_bytes]
