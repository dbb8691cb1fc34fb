"""How the bytes of a push travel, and what the trainer tells the workers of it.

    Channel      one broadcast from the trainer (rank 0) to every worker; GlooChannel and NcclChannel implement it
    Rendezvous   where and as which rank a worker joins the trainer's group
    Update       which parameters one push holds, in the order in which they are sent

`dataclasses.asdict` makes JSON of the last two, and `Rendezvous(**body)` and `Update(**body)` read it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch


class GroupLostError(RuntimeError):
    """A peer is lost or has left, or this end has: the other ends may know why."""


class Channel(Protocol):
    """A group of the trainer, rank 0, and every worker of every rollout server.

    A class of channels is made as `SomeChannel(store, rendezvous, rank, device)` when all ranks have come to the store
    (services/weight_transfer/rendezvous.py); `device` is that of the model on this end.
    """

    device: torch.device
    """Where the buffers live that are broadcast."""

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Send from rank 0, or receive into, a contiguous uint8 tensor on `device`; may be called from any thread.

        Returns when the buffer may be read, or written again.

        Raises:
            TimeoutError: this broadcast took longer than the rendezvous' `timeout_s`.
            GroupLostError: a peer is lost, or the channel was aborted.
        """

    def abort(self) -> None:
        """Leave the group; a broadcast that runs in another thread ends with a GroupLostError. Safe to call twice."""


@dataclass(frozen=True)
class Rendezvous:
    """Where a server's workers join the trainer's group.

    Attributes:
        rank_offset: rank of the server's first worker; the trainer is rank 0.
        world_size: the trainer and all workers of all servers.
        timeout_s: deadline of each stage: to join, and to receive one push.
        attempt: of this trainer to meet its workers; those of another one are not counted.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float
    attempt: int = 0


@dataclass(frozen=True)
class Update:
    """What one push contains, in the order in which it is sent.

    Attributes:
        dtype_names: as torch names them, "float32".
        shapes: of the whole tensors, as in a checkpoint.
        bucket_bytes: how much travels in one broadcast, at least one layer (services/weight_transfer/buckets.py).
    """

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    bucket_bytes: int


@contextmanager
def stage_deadline(channel: Channel, stage: str, timeout_s: float) -> Iterator[None]:
    """Aborts the channel when the body takes longer than `timeout_s`, however many broadcasts it consists of.

    Raises:
        TimeoutError: in place of the error with which the aborted broadcast ended.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        channel.abort()

    timer = threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if expired.is_set():
            raise TimeoutError(f"{stage} took longer than weight_sync.stage_timeout_s = {timeout_s:g} s") from error
        raise
    finally:
        timer.cancel()
