"""A stand-in for vLLM's nccl communicator: carries bytes between the threads of one process, and records every call.

Like nccl it has no deadline: a rank that misses a peer hangs until its group is aborted, and is then let go as if all were well.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import torch
from vllm.distributed.utils import StatelessProcessGroup


@dataclass(frozen=True)
class Call:
    """One call of one rank."""

    rank: int
    name: str
    num_bytes: int = 0
    device: str = ""
    thread: int = field(default_factory=threading.get_ident, compare=False)


@dataclass
class RecordingNccl:
    """What the communicators of a test share; `communicator` stands for vLLM's class."""

    calls: list[Call] = field(default_factory=list)
    absent: set[int] = field(default_factory=set)
    """Ranks whose broadcasts hang, as if their process had been stopped."""
    fails: Exception | None = None
    """What every broadcast raises."""
    disabled: bool = False
    """As vLLM's communicator is where there is no nccl."""
    damage: Callable[[int, int, torch.Tensor], None] | None = None
    """Called with (rank, number of the broadcast, the bytes that are about to arrive there), which it may change."""
    _queues: dict[tuple[int, int], "SimpleQueue[torch.Tensor]"] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def communicator(self, group: StatelessProcessGroup, device: torch.device) -> "Communicator":
        # As in vLLM: the ranks meet over the group's store.
        group_id = group.broadcast_obj(len(self.calls) if group.rank == 0 else None, src=0)
        return Communicator(self, group_id, group, device)

    def of(self, rank: int, name: str) -> list[Call]:
        return [call for call in self.calls if (call.rank, call.name) == (rank, name)]

    def record(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)

    def queue(self, group_id: int, rank: int) -> "SimpleQueue[torch.Tensor]":
        with self._lock:
            return self._queues.setdefault((group_id, rank), SimpleQueue())


class Communicator:
    def __init__(
        self, shared: RecordingNccl, group_id: int, group: StatelessProcessGroup, device: torch.device
    ) -> None:
        self._shared, self._group_id = shared, group_id
        self.group = group  # its store must live while others still join
        self.rank, self.world_size = group.rank, group.world_size
        self.disabled = shared.disabled
        self._aborted = threading.Event()
        self._num_broadcasts = 0
        shared.record(Call(self.rank, "init", device=str(device)))

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0 and tensor.dtype == torch.uint8 and tensor.is_contiguous()
        self._shared.record(Call(self.rank, "broadcast", tensor.numel(), str(tensor.device)))
        if self.disabled:
            return
        if self._shared.fails is not None:
            raise self._shared.fails
        number, self._num_broadcasts = self._num_broadcasts, self._num_broadcasts + 1
        if self._shared.absent & set(range(self.world_size)):
            self._aborted.wait()
        elif self.rank == 0:
            for rank in range(1, self.world_size):
                self._shared.queue(self._group_id, rank).put(tensor.clone())
        else:
            self._receive(tensor, number)

    def _receive(self, tensor: torch.Tensor, number: int) -> None:
        while not self._aborted.is_set():
            try:
                arrived = self._shared.queue(self._group_id, self.rank).get(timeout=0.01)
            except Empty:
                continue
            assert arrived.numel() == tensor.numel(), "nccl would hang, or write past the end"
            if self._shared.damage is not None:
                self._shared.damage(self.rank, number, arrived)
            tensor.copy_(arrived)
            return

    def destroy(self) -> None:
        self._shared.record(Call(self.rank, "destroy"))
        self._aborted.set()
