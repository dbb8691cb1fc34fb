"""The whole student in host memory, where ranks hold parts of it: what is pushed from, and what is left when a rank dies.

Gathering needs every rank, a push or the saving of a student may take long, fail and be repeated: so rank 0 gathers once a
version, and all else reads the copy. The memory belongs to no process (memfd): it is there for as long as one of the ranks on
this machine lives. There are two copies, of which one is whole at any time.
"""

import fcntl
import mmap
import os
import secrets
from collections.abc import Iterator

import torch
from torch import Tensor

from services.errors import StartupError
from services.weight_transfer.source import ParamMeta, WeightSource
from trainer.ranks.group import Ranks

_ALIGNMENT = 64
_HEADER_BYTES = mmap.PAGESIZE
# In the header: a token of the run, and the version of each copy.
_TOKEN, _VERSIONS = slice(0, 8), slice(8, 24)
_NO_VERSION = -1


class HostCopy:
    """Two copies of a student; use `create` or `share`.

    Args:
        descriptor: of the memory.
        parameters: names, dtypes and shapes, in their order.
    """

    def __init__(self, descriptor: int, parameters: list[ParamMeta]) -> None:
        self._descriptor, self._parameters = descriptor, parameters
        self._offsets, self._size = _layout(parameters)
        memory = mmap.mmap(descriptor, _HEADER_BYTES + 2 * self._size)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._versions = self._bytes[_VERSIONS].view(torch.int64)

    @classmethod
    def create(cls, parameters: list[ParamMeta]) -> "HostCopy":
        """Raises:
        StartupError: there is no room.
        """
        size = _HEADER_BYTES + 2 * _layout(parameters)[1]
        descriptor = os.memfd_create("student", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            os.close(descriptor)
            raise StartupError(
                f"two copies of the student, {size / 2**30:.1f} GiB of this machine's memory, cannot be had: {error.strerror}; "
                "free some, or take a smaller student.model or rollout.dtype"
            ) from error
        copy = cls(descriptor, parameters)
        copy._versions.fill_(_NO_VERSION)
        return copy

    @classmethod
    def share(cls, ranks: Ranks, parameters: list[ParamMeta]) -> "HostCopy | None":
        """That which rank 0 makes; None on a rank of another machine or container, for which there is none.

        Raises:
            StartupError: there is no room.
        """
        copy, token = None, secrets.randbits(62)
        if ranks.index == 0:
            copy = cls.create(parameters)
            copy._bytes[_TOKEN].view(torch.int64).fill_(token)
        process, descriptor, token = map(ranks.of_first, (os.getpid(), copy._descriptor if copy else 0, token))
        if copy is not None:
            return copy
        try:
            found = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
        except OSError:
            return None
        is_it = os.pread(found, 8, 0) == token.to_bytes(8, "little")
        if not is_it:  # of a machine on which the number is another process's
            os.close(found)
        return cls(found, parameters) if is_it else None

    def fill(self, version: int, tensors: Iterator[tuple[str, Tensor]]) -> WeightSource:
        """Put a version in the place of the older copy.

        Returns:
            the copy, which is whole until the version after the next one.
        """
        half = 1 - int(self._versions.argmax())
        self._versions[half] = _NO_VERSION
        for view, (_, tensor) in zip(self._views(half), tensors, strict=True):
            view.copy_(tensor)
        self._versions[half] = version
        return _Copied(self._parameters, self._views(half))

    def latest(self) -> tuple[int, dict[str, Tensor]] | None:
        """The newest version that is whole, under the names of a checkpoint."""
        half = int(self._versions.argmax())
        version = int(self._versions[half])
        if version == _NO_VERSION:
            return None
        return version, {p.name: view for p, view in zip(self._parameters, self._views(half), strict=True)}

    def claim(self) -> bool:
        """Whether nobody else on this machine has claimed it: who has saves the student."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _views(self, half: int) -> list[Tensor]:
        start = _HEADER_BYTES + half * self._size
        views = []
        for parameter, offset in zip(self._parameters, self._offsets, strict=True):
            part = self._bytes[start + offset : start + offset + _num_bytes(parameter)]
            views.append(part.view(parameter.dtype).view(parameter.shape))
        return views


class _Copied(WeightSource):
    def __init__(self, parameters: list[ParamMeta], views: list[Tensor]) -> None:
        self._parameters, self._views = parameters, views

    def metadata(self) -> list[ParamMeta]:
        return self._parameters

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((p.name, view) for p, view in zip(self._parameters, self._views, strict=True))


def _num_bytes(parameter: ParamMeta) -> int:
    return torch.Size(parameter.shape).numel() * parameter.dtype.itemsize


def _layout(parameters: list[ParamMeta]) -> tuple[list[int], int]:
    """Where each parameter begins, and the size of a copy, a multiple of a page."""
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(end)
        end += -(-_num_bytes(parameter) // _ALIGNMENT) * _ALIGNMENT
    return offsets, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
