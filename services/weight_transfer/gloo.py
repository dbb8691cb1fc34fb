"""Weight transfer through host memory: vLLM's engine interface on both ends, gloo in between.

    trainer, rank 0                                      vLLM worker, rank rank_offset + its own rank
    ---------------                                      --------------------------------------------
    start_weight_update  ── HTTP ──────────────────────► initialize_layerwise_reload
    update_weights       ── HTTP, returns at the end ──► receive_weights:
      for bucket: broadcast bytes, digest ── gloo ─────►   verify digest, model.load_weights
    finish_weight_update ── HTTP ──────────────────────► finalize_layerwise_reload, repack CPU GEMMs

Both ends cut the parameters into the same buckets from the same (name, dtype, shape) list, so no sizes
travel. Works for CPU and CUDA tensors. Left out: overlap of packing and sending.
"""

import hashlib
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch
from torch.distributed import ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from services.weight_transfer.reload import discard_partial_update, modules_without_weights, repack_cpu_linears
from services.weight_transfer.rendezvous import listen_on, own_address

_DIGEST_BYTES = 16
_ARRIVED = "distillserve/arrived"
"""In the store, how many workers have come."""
_POLL_S = 0.01


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """What a worker needs to join the trainer's group."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float
    bucket_bytes: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What one push contains, in the order in which it is sent."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    def parameters(self) -> list[ParamMeta]:
        described = zip(self.names, self.dtype_names, self.shapes, strict=True)
        return [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in described]


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """The trainer's end; `client` hands each server its own rank offset."""

    backend: ClassVar[str] = "gloo"

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float = 120.0
    bucket_bytes: int = 256 << 20


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The worker's end, created by vLLM in every worker process."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group: ProcessGroupGloo | None = None
        self.bucket_bytes = 0
        # It warns of a tied head at every push; finish_weight_update reports what is really missing.
        logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group; blocks until every rank has arrived or the deadline has passed."""
        parallel = self.parallel_config
        worker_rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.bucket_bytes = init_info.bucket_bytes
        self.group = join_group(
            init_info.master_address,
            init_info.master_port,
            rank=init_info.rank_offset + worker_rank,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Put every layer into the state in which it buffers checkpoint tensors."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, without its device synchronisation where there is no device (it fails on CPU)."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive every bucket, verify it, load it; on any failure leave no half-filled layer behind."""
        if self.group is None:
            raise RuntimeError("no trainer has joined: call init_weight_transfer_engine first")
        try:
            for bucket in cut_into_buckets(update_info.parameters(), self.bucket_bytes):
                self.model.load_weights(self._receive_bucket(bucket))
        except BaseException:
            discard_partial_update(self.model, self.model_config)
            self.shutdown()
            raise

    def _receive_bucket(self, bucket: Sequence[ParamMeta]) -> Iterable[tuple[str, torch.Tensor]]:
        assert self.group is not None
        packed = torch.empty(sum(map(num_bytes, bucket)), dtype=torch.uint8)
        digest = torch.empty(_DIGEST_BYTES, dtype=torch.uint8)
        broadcast(self.group, packed)
        broadcast(self.group, digest)
        if not torch.equal(digest, digest_of(packed)):
            raise RuntimeError(f"weights arrived damaged, between {bucket[0].name} and {bucket[-1].name}")
        return unpack(packed.to(self.device), bucket)

    def finish_weight_update(self) -> None:
        """Finalize the reload and report parameters that never came (vLLM itself only warns)."""
        missing = modules_without_weights(self.model)
        finalize_layerwise_reload(self.model, self.model_config)
        repack_cpu_linears(self.model)
        if missing:
            raise RuntimeError(f"no weights arrived for {', '.join(missing)}; these modules keep their old weights")

    def shutdown(self) -> None:
        """Leave the group; safe to call twice."""
        if self.group is not None:
            self.group.abort()
            self.group = None


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The trainer's end: drives the handshake over HTTP and broadcasts from rank 0."""

    init_info_cls = GlooTrainerInitInfo

    def __init__(
        self, *, client: VLLMWeightSyncClient, source: WeightSource, is_sender: bool, init_info: GlooTrainerInitInfo
    ) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self.bucket_bytes = init_info.bucket_bytes
        self.group: ProcessGroupGloo | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        """Rendezvous with every worker of every server."""
        if source is None:
            raise ValueError("the gloo engine pushes full weights and needs a WeightSource")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender, init_info=init_info)
        if engine.is_sender:
            worker = GlooInitInfo(
                master_address=init_info.master_address,
                master_port=init_info.master_port,
                rank_offset=1,
                world_size=init_info.world_size,
                timeout_s=init_info.timeout_s,
                bucket_bytes=init_info.bucket_bytes,
            )
            # The workers block in their half of the rendezvous until ours has happened.
            with ThreadPoolExecutor(max_workers=1) as executor:
                told = executor.submit(client.init_weight_transfer_engine, asdict(worker))
                engine.group = join_group(
                    init_info.master_address, init_info.master_port, 0, init_info.world_size, init_info.timeout_s, told
                )
                told.result()
        return engine

    def send_weights(self) -> None:
        """One full push; on a failure the group is closed, so that no worker waits for the rest."""
        assert self.source is not None
        parameters = self.source.metadata()
        if not self.is_sender:
            for _ in self.source:  # take part in the collectives that gather sharded weights
                pass
            return
        update = GlooUpdateInfo(
            names=[p.name for p in parameters],
            dtype_names=[str(p.dtype).removeprefix("torch.") for p in parameters],
            shapes=[list(p.shape) for p in parameters],
        )
        self.client.start_weight_update()
        executor = ThreadPoolExecutor(max_workers=1)
        try:
            received = executor.submit(self.client.update_weights, asdict(update))
            self._broadcast(parameters)
            received.result()
        except BaseException:
            self.shutdown()
            raise
        finally:
            executor.shutdown(wait=False)
        self.client.finish_weight_update()

    def _broadcast(self, parameters: Sequence[ParamMeta]) -> None:
        assert self.group is not None, "trainer_init() comes before send_weights()"
        tensors = iter(self.source or ())
        for bucket in cut_into_buckets(parameters, self.bucket_bytes):
            packed = pack(bucket, tensors)
            broadcast(self.group, packed)
            broadcast(self.group, digest_of(packed))
        if (extra := next(tensors, None)) is not None:
            raise ValueError(f"the weight source yields {extra[0]} after the last parameter its metadata announces")

    def shutdown(self) -> None:
        """Leave the group; safe to call twice."""
        if self.group is not None:
            self.group.abort()
            self.group = None


# ------------------------------------------------------------------------------------- the bytes on the wire


def join_group(
    address: str, port: int, rank: int, world_size: int, timeout_s: float, told: "Future[Any] | None" = None
) -> ProcessGroupGloo:
    """A gloo group of its own, apart from torch's default one; rank 0 hosts the rendezvous store, on `address` alone.

    Args:
        told: for rank 0, what tells the others to come; once that has failed they are not waited for.

    Raises:
        TimeoutError: not everybody has come in time.
    """
    timeout = timedelta(seconds=timeout_s)
    listener = listen_on(address, port).detach() if rank == 0 else None  # the store closes it
    store = TCPStore(
        address,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener,
    )
    if rank == 0:
        _await_workers(store, world_size - 1, timeout_s, told)
    else:
        store.add(_ARRIVED, 1)
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return ProcessGroupGloo(store, rank, world_size, timeout)
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stubs
    options._timeout = timeout
    # Torch's own choice is the address of the machine's name, which many networks do not know, or know as 127.0.1.1.
    options._devices = [ProcessGroupGloo.create_device(hostname=own_address(address, port))]
    return ProcessGroupGloo(store, rank, world_size, options)


def _await_workers(store: TCPStore, num_workers: int, timeout_s: float, told: "Future[Any] | None") -> None:
    deadline = time.monotonic() + timeout_s
    while (arrived := store.add(_ARRIVED, 0)) < num_workers:
        if told is not None and told.done():
            told.result()
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{arrived} of {num_workers} workers of the rollout servers came to {store.host}:{store.port} within "
                f"{timeout_s:g} s; they must reach weight_sync.master_address there (name, firewall), or raise "
                "weight_sync.stage_timeout_s"
            )
        time.sleep(_POLL_S)


def broadcast(group: ProcessGroupGloo, tensor: torch.Tensor) -> None:
    """Send from rank 0, or receive into, a CPU tensor; blocks."""
    group.broadcast(tensor, 0).wait()  # type: ignore[attr-defined]  # missing in torch's stubs


def num_bytes(parameter: ParamMeta) -> int:
    return math.prod(parameter.shape) * parameter.dtype.itemsize


def cut_into_buckets(parameters: Sequence[ParamMeta], bucket_bytes: int) -> Iterator[list[ParamMeta]]:
    """Runs of parameters of at most `bucket_bytes`; a larger parameter travels alone."""
    bucket: list[ParamMeta] = []
    size = 0
    for parameter in parameters:
        if bucket and size + num_bytes(parameter) > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += num_bytes(parameter)
    if bucket:
        yield bucket


def pack(bucket: Sequence[ParamMeta], tensors: Iterator[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """Take the bucket's tensors from the source into one CPU byte tensor, checked against what was announced.

    Raises:
        ValueError: the source yields other parameters than its metadata() declares.
    """
    packed = torch.empty(sum(map(num_bytes, bucket)), dtype=torch.uint8)
    offset = 0
    for expected in bucket:
        name, tensor = next(tensors, ("(nothing)", torch.empty(0)))
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected.name, expected.dtype, expected.shape):
            raise ValueError(
                f"the weight source yields {name} {tensor.dtype} {tuple(tensor.shape)} where its metadata "
                f"announces {expected.name} {expected.dtype} {expected.shape}"
            )
        size = num_bytes(expected)
        packed[offset : offset + size].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        offset += size
    return packed


def unpack(packed: torch.Tensor, bucket: Sequence[ParamMeta]) -> list[tuple[str, torch.Tensor]]:
    """Views into the received bytes; the caller keeps the buffer alive for as long as it needs them.

    Parameters of one bucket may have different dtypes; a view needs an offset that is a multiple of its
    item size, so where it is not the bytes are copied.
    """
    tensors, offset = [], 0
    for parameter in bucket:
        size = num_bytes(parameter)
        flat = packed[offset : offset + size]
        if offset % parameter.dtype.itemsize:
            flat = flat.clone()
        tensors.append((parameter.name, flat.view(parameter.dtype).view(parameter.shape)))
        offset += size
    return tensors


def digest_of(packed: torch.Tensor) -> torch.Tensor:
    """[16] uint8 hash of a CPU byte tensor."""
    digest = hashlib.blake2b(packed.numpy().data, digest_size=_DIGEST_BYTES).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)
