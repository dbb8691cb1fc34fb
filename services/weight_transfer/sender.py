"""The trainer's end of a push.

    calling thread   take the tensors of bucket n + 1 from the source, pack, checksum      waits for the buffer it packs into
    thread           broadcast of bucket n                                                 waits for the slowest worker;
                     ends with the stage's deadline, with `abort`, or when a worker leaves the group

The source is iterated in the calling thread: to gather sharded weights is a collective of all ranks of the trainer.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from threading import Thread
from typing import Any

import torch
from torch.distributed import TCPStore
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from services.errors import WeightSyncError
from services.weight_transfer.buckets import Bucket, Buffers, as_bytes, checksum, cut_into_buckets, describe, unpack
from services.weight_transfer.channel import Channel, Rendezvous, Update, stage_deadline
from services.weight_transfer.plugin import channel_class
from services.weight_transfer.rendezvous import await_workers, host_store

_NAMES_SHOWN = 8


class WeightSender:
    """Sends the weights of a source to every worker of every rollout server.

    Args:
        backend: "gloo" or "nccl".
        address: of this machine, at which the workers reach it; `weight_sync.master_address`.
        port: on which the workers meet; 0: any free one. `weight_sync.master_port`.
        timeout_s: deadline of each stage.
        bucket_bytes: how much travels in one broadcast.
        device: of the model; nccl sends from its memory, gloo from the host's.
    """

    def __init__(
        self,
        backend: str,
        address: str,
        port: int,
        timeout_s: float,
        bucket_bytes: int,
        device: torch.device,
    ) -> None:
        self._make_channel = channel_class(backend)
        self._address, self._port = address, port
        self._timeout_s, self._bucket_bytes, self._device = timeout_s, bucket_bytes, device
        self._store: TCPStore | None = None
        self._attempts = 0
        self._channel: Channel | None = None

    def connect(self, tell: Callable[[dict[str, Any]], object], world_size: int) -> None:
        """Meet all workers; an old group is left.

        Args:
            tell: given a `Rendezvous` for the first server (`rank_offset` 1), makes the workers of all servers come.
                Called in a thread of its own; once it has failed, workers are not waited for.
            world_size: this sender and all workers; another one than before where servers have gone or come.

        Raises:
            WeightSyncError: the address or the port cannot be had.
            TimeoutError: not everybody has come in time.
            Exception: what `tell` raised.
        """
        self.abort()
        if self._store is None:
            self._store = host_store(self._address, self._port, self._timeout_s)
        self._attempts += 1
        rendezvous = Rendezvous(self._address, self._store.port, 1, world_size, self._timeout_s, attempt=self._attempts)
        told: Future[None] = Future()
        # A daemon: servers that never answer must not keep the process from ending.
        Thread(target=_run, args=(tell, asdict(rendezvous), told), name="weights-tell", daemon=True).start()
        try:
            store = await_workers(self._store, rendezvous, told)
            self._attach(self._make_channel(store, rendezvous, 0, self._device))
            told.result()
        except BaseException:
            self.abort()
            raise

    def _attach(self, channel: Channel) -> None:
        self._channel, self._buffers = channel, Buffers(channel.device)

    def update(self, source: WeightSource) -> Update:
        """What the workers are told of a push of this source."""
        return describe(source.metadata(), self._bucket_bytes)

    def send(self, source: WeightSource) -> list[str]:
        """Broadcast everything the source yields; on a failure the group is left, so that no worker waits for the rest.

        Returns:
            Checksum of the source's tensors, per bucket.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
            RuntimeError: a worker is lost, there is no group, or `abort` was called.
            ValueError: the source yields something else than its metadata announces.
        """
        channel = self._channel
        if channel is None:
            raise RuntimeError("no worker has joined: connect first")
        buckets = cut_into_buckets(self.update(source))
        try:
            with stage_deadline(channel, "sending the weights", self._timeout_s):
                return self._pack_and_broadcast(channel, buckets, iter(source))
        except BaseException:
            self.abort()
            raise

    def _pack_and_broadcast(
        self, channel: Channel, buckets: list[Bucket], tensors: Iterator[tuple[str, torch.Tensor]]
    ) -> list[str]:
        self._buffers.reserve(buckets)
        checksums: list[str] = []
        sent: list[Future[None]] = []
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights-send") as executor:
            try:
                for index, bucket in enumerate(buckets):
                    if index >= 2:
                        sent[index - 2].result()  # its buffer is the one that is needed now
                    whole = [_next(tensors, parameter) for parameter in bucket.parameters]
                    sent.append(executor.submit(channel.broadcast, self._pack(channel, index, bucket, whole)))
                    # Of the source, not of the buffer: what the buffer held before must not pass for it.
                    checksums.append(checksum(whole))
                    del whole
                if (extra := next(tensors, None)) is not None:
                    raise ValueError(
                        f"the weight source yields {extra[0]} after the last one that its metadata announces"
                    )
                for broadcast in sent:
                    broadcast.result()
            except BaseException:
                channel.abort()  # ends the thread, which the executor waits for
                raise
        return checksums

    def _pack(self, channel: Channel, index: int, bucket: Bucket, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The bytes of a bucket where the channel can send them; a lone tensor that is there already is not copied."""
        if len(tensors) == 1 and tensors[0].device == channel.device:
            return as_bytes(tensors[0])
        buffer = self._buffers.of(index, bucket)
        for (_, packed), tensor in zip(unpack(buffer, bucket), tensors, strict=True):
            packed.copy_(tensor)
        if channel.device.type != "cpu":
            torch.accelerator.synchronize()  # the copies have been queued, and another thread will send them
        return buffer

    def abort(self) -> None:
        """Leave the group, at once, also while `send` runs in another thread; safe to call twice."""
        channel, self._channel = self._channel, None  # two threads may come here at once
        if channel is not None:
            channel.abort()


def _run(tell: Callable[[dict[str, Any]], object], rendezvous: dict[str, Any], told: "Future[None]") -> None:
    try:
        tell(rendezvous)
    except BaseException as error:
        told.set_exception(error)
    else:
        told.set_result(None)


def _next(tensors: Iterator[tuple[str, torch.Tensor]], expected: ParamMeta) -> torch.Tensor:
    """The next tensor of the source, contiguous, checked against what its metadata announces."""
    name, tensor = next(tensors, ("(nothing)", torch.empty(0)))
    if (name, tensor.dtype, tuple(tensor.shape)) != (expected.name, expected.dtype, expected.shape):
        raise ValueError(
            f"the weight source yields {name} {tensor.dtype} {tuple(tensor.shape)} where its metadata announces "
            f"{expected.name} {expected.dtype} {expected.shape}"
        )
    return tensor.detach().contiguous()


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
    buckets = cut_into_buckets(update)
    for url, workers in zip(urls, reports, strict=True):
        if not workers:
            raise WeightSyncError(f"{url} reports of no worker what it received")
        for rank, report in enumerate(workers):
            if (fault := _fault(buckets, checksums, report)) is not None:
                raise WeightSyncError(f"worker {rank} of {url}: {fault}")


def _fault(buckets: list[Bucket], checksums: list[str], report: dict[str, Any]) -> str | None:
    if problem := report.get("problem"):
        return str(problem)
    received = report.get("checksums")
    if not isinstance(received, list) or len(received) != len(checksums):
        return f"its report has no checksum for each of the {len(checksums)} buckets"
    for bucket, ours, theirs in zip(buckets, checksums, received, strict=True):
        if theirs != ours:
            first, last = bucket.parameters[0].name, bucket.parameters[-1].name
            tensors = first if first == last else f"the parameters from {first} to {last}"
            return f"{tensors} did not arrive as they were sent: other checksums"
    missing = report.get("missing")
    if not isinstance(missing, list):
        return "its report does not say which parameters are missing"
    if missing:
        more = f" and {len(missing) - _NAMES_SHOWN} more" if len(missing) > _NAMES_SHOWN else ""
        return f"no weights came for {', '.join(map(str, missing[:_NAMES_SHOWN]))}{more}"
    return None
