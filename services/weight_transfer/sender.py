"""The trainer's end of a push."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightSource

from services.weight_transfer.channel import Update


class WeightSender:
    """Sends the weights of a source to every worker of every rollout server.

    Args:
        backend: "gloo" or "nccl".
        address: of this machine, at which the workers reach it; `weight_sync.master_address`.
        port: on which the workers meet; 0: any free one. `weight_sync.master_port`.
        world_size: the trainer's one sender and all workers.
        timeout_s: deadline of each stage.
        bucket_bytes: how much travels in one broadcast.
        device: of the model; nccl sends from its memory, gloo from the host's.
    """

    def __init__(
        self,
        backend: str,
        address: str,
        port: int,
        world_size: int,
        timeout_s: float,
        bucket_bytes: int,
        device: torch.device,
    ) -> None:
        raise NotImplementedError

    def connect(self, tell: Callable[[dict[str, Any]], object]) -> None:
        """Meet all workers; an old group is left.

        Args:
            tell: given a `Rendezvous` for the first server (`rank_offset` 1), makes the workers of all servers come.
                Called in a thread of its own; once it has failed, workers are not waited for.

        Raises:
            WeightSyncError: the address or the port cannot be had.
            TimeoutError: not everybody has come in time.
            Exception: what `tell` raised.
        """
        raise NotImplementedError

    def update(self, source: WeightSource) -> Update:
        """What the workers are told of a push of this source."""
        raise NotImplementedError

    def send(self, source: WeightSource) -> list[str]:
        """Broadcast everything the source yields; on a failure the group is left, so that no worker waits for the rest.

        Returns:
            Checksum of the source's tensors, per bucket.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
            RuntimeError: a worker is lost, there is no group, or `abort` was called.
            ValueError: the source yields something else than its metadata announces.
        """
        raise NotImplementedError

    def abort(self) -> None:
        """Leave the group, at once, also while `send` runs in another thread; safe to call twice."""
        raise NotImplementedError


def check_arrival(
    update: Update, checksums: list[str], reports: Sequence[Sequence[dict[str, Any]]], urls: Sequence[str]
) -> None:
    """Every worker of every server must have received all parameters, byte for byte.

    Args:
        checksums: what `WeightSender.send` returned.
        reports: per server and worker what `weights_receive` returned.
        urls: of the servers.

    Raises:
        WeightSyncError: something did not arrive; names server, worker and tensors.
    """
    raise NotImplementedError
