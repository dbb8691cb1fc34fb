"""A worker's end of a push.

thread   broadcast of bucket n + 1                 waits for the trainer; ends with the stage's deadline, or when the
                                                   trainer or another worker leaves the group
thread   checksum of bucket n
main     load_weights of bucket n                  waits for both threads

trainer, rank 0                              worker, rank rank_offset + its own rank
---------------                              ---------------------------------------
start    ── HTTP ──────────────────────────► initialize_layerwise_reload
receive  ── HTTP, returns at the end ──────► for each bucket: receive, checksum, load_weights
  broadcast of each bucket ── channel ─────►
compare checksums and names
finish   ── HTTP ──────────────────────────► finalize_layerwise_reload, pack tied heads
"""

import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from services.weight_transfer.arrivals import Arrivals
from services.weight_transfer.buckets import Bucket, Buffers, checksum, cut_into_buckets, unpack
from services.weight_transfer.channel import Channel, Rendezvous, Update, stage_deadline
from services.weight_transfer.plugin import channel_class
from services.weight_transfer.reload import (
    discard_partial_update,
    is_reloading,
    load_embeddings_in_place,
    repack_tied_heads,
    return_expert_kernels,
    take_expert_kernels,
)
from services.weight_transfer.rendezvous import join_store


@dataclass
class Receipt:
    """What a worker received in one update.

    Attributes:
        checksums: blake3 of the parameters' bytes, per bucket, in hexadecimal.
        missing: names of what parameters of this worker lack.
    """

    checksums: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    bytes_received: int = 0
    parameters_received: int = 0


class WeightReceiver(WeightTransferEngine[Rendezvous, Update]):
    """What vLLM creates in every worker process; services/weight_transfer/worker.py calls it.

    Attributes:
        boot_id: of this worker process.
        label: of the weights that the model computes with; None before the first finish, and when a part of an update was
            discarded that had already replaced some of them.
        state: of the update.
        receipt: of the update under way, or of the last one.
        problem: the last one since an update was started.
    """

    init_info_cls = Rendezvous
    update_info_cls = Update

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.boot_id = uuid.uuid4().hex
        self.label: str | None = None
        self.state: Literal["none", "started", "received"] = "none"
        self.receipt = Receipt()
        self.problem: str | None = None
        self._channel: Channel | None = None
        self._timeout_s = 0.0
        self._arrivals: Arrivals | None = None
        self._expert_kernels: dict[torch.nn.Module, Any] = {}
        # It warns of a tied head at every push; what is really missing is in the receipt.
        logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)

    @property
    def is_connected(self) -> bool:
        return self._channel is not None

    def init_transfer_engine(self, init_info: Rendezvous) -> None:
        """Join the trainer's group, and leave that of another trainer; blocks until every rank has arrived.

        Raises:
            RuntimeError: the trainer, or another worker, cannot be reached within the deadline.
        """
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        make = channel_class(self.config.backend)
        self._attach(make(join_store(init_info), init_info, rank, self.device), init_info.timeout_s)

    def _attach(self, channel: Channel, timeout_s: float) -> None:
        self._channel, self._timeout_s = channel, timeout_s
        self._buffers = Buffers(channel.device)

    def start_weight_update(self) -> None:
        """Put every layer into the state in which it buffers checkpoint tensors; an update before is discarded."""
        self.discard()
        self.receipt, self.problem = Receipt(), None
        self.state = "started"
        if self.device.type == "cpu":
            self._expert_kernels = take_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)
        load_embeddings_in_place(self.model)
        self._arrivals = Arrivals(self.model)

    def receive_weights(self, update_info: Update) -> None:
        """Receive and load every bucket; on a failure the group is left, so that nobody waits for this worker.

        What was loaded stays until `finish_weight_update` or `discard`.

        Raises:
            RuntimeError: no update was started, there is no group, a peer is lost, or a layer refuses its weights.
            TimeoutError: the stage's deadline has passed.
            ValueError: the update cannot be that of a trainer.
        """
        if self._channel is None:
            raise RuntimeError("this worker has joined no trainer")
        if self.state != "started" or self._arrivals is None:
            raise RuntimeError("no update was started")
        try:
            with stage_deadline(self._channel, "receiving the weights", self._timeout_s):
                self._receive_and_load(self._channel, self._arrivals, cut_into_buckets(update_info))
        except BaseException:
            self.shutdown()
            raise
        self.receipt.missing = self._arrivals.missing(set(update_info.names))
        self.state = "received"

    def _receive_and_load(self, channel: Channel, arrivals: Arrivals, buckets: list[Bucket]) -> None:
        self._buffers.reserve(buckets)
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="weights") as executor:
            try:
                arriving = executor.submit(self._receive, channel, buckets, 0)
                for index, bucket in enumerate(buckets):
                    arriving.result()
                    buffer = self._buffers.of(index, bucket)
                    summed = executor.submit(checksum, [tensor for _, tensor in unpack(buffer, bucket)])
                    arriving = executor.submit(self._receive, channel, buckets, index + 1)
                    self._load(arrivals, bucket, buffer)
                    self.receipt.checksums.append(summed.result())  # before the buffer is used again
            except BaseException:
                channel.abort()  # ends the thread, which the executor waits for
                raise

    def _receive(self, channel: Channel, buckets: list[Bucket], index: int) -> None:
        if index < len(buckets):
            channel.broadcast(self._buffers.of(index, buckets[index]))

    def _load(self, arrivals: Arrivals, bucket: Bucket, buffer: torch.Tensor) -> None:
        with arrivals.recording():
            self.model.load_weights(unpack(buffer, bucket))
        arrivals.release(buffer)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # the copies have been queued, and the buffer is about to be used again
        self.receipt.bytes_received += bucket.num_bytes
        self.receipt.parameters_received += len(bucket.parameters)

    def finish_weight_update(self, label: str | None = None) -> None:
        """Make the model compute with what was received, under a label.

        Raises:
            RuntimeError: nothing was received, or not everything.
        """
        if self.state != "received":
            raise RuntimeError("no update was received")
        if self.receipt.missing:
            raise RuntimeError(f"no weights came for {', '.join(self.receipt.missing)}")
        self.label = None
        finalize_layerwise_reload(self.model, self.model_config)
        return_expert_kernels(self._expert_kernels)
        repack_tied_heads(self.model)
        self._arrivals, self.state, self.label = None, "none", label

    def discard(self) -> bool:
        """Forget an update that was not finished; once more does nothing.

        Returns:
            Whether some layers hold new weights already: they keep them, and the model is a mixture until the next push.
        """
        arrivals, self._arrivals, self.state = self._arrivals, None, "none"
        changed = arrivals is not None and arrivals.changed()
        if changed:
            self.label = None
        if is_reloading(self.model):
            discard_partial_update(self.model, self.model_config)
        return_expert_kernels(self._expert_kernels)
        return changed

    def shutdown(self) -> None:
        """Leave the group and free its buffers; safe to call twice."""
        if self._channel is not None:
            self._channel.abort()
            self._channel = None
            del self._buffers
