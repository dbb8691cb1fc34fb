"""A worker's model with what makes vLLM's loading hard, and a channel in memory that can do damage."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from services.weight_transfer.receiver import WeightReceiver
from services.weight_transfer.sender import WeightSender, check_arrival

VOCABULARY, PADDED, WIDTH, NUM_LAYERS = 6, 8, 4, 3
CPU = torch.device("cpu")

Parameters = dict[str, torch.Tensor]


class Embedding(torch.nn.Module):
    """Its weight has more rows than a checkpoint's, as that of a vocabulary that vLLM pads."""

    def __init__(self) -> None:
        super().__init__()
        self.quant_method: Any = UnquantizedEmbeddingMethod()
        self.weight = torch.nn.Parameter(torch.zeros(PADDED, WIDTH, dtype=torch.bfloat16), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self.load})

    def load(self, param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        param[: len(loaded_weight)].data.copy_(loaded_weight)
        param[len(loaded_weight) :].data.fill_(0)


class Fused(torch.nn.Module):
    """One matrix and one bias for three projections."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3 * WIDTH, WIDTH, dtype=torch.bfloat16), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.zeros(3 * WIDTH, dtype=torch.bfloat16), requires_grad=False)
        for parameter in (self.weight, self.bias):
            set_weight_attrs(parameter, {"weight_loader": self.load})

    def load(self, param: torch.Tensor, loaded_weight: torch.Tensor, shard: int) -> None:
        param.data.narrow(0, shard * WIDTH, WIDTH).copy_(loaded_weight)


class Norm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(WIDTH, dtype=torch.bfloat16), requires_grad=False)


class Model(torch.nn.Module):
    """Stands for vLLM's: a padded embedding, a head tied to it, fused projections with a bias."""

    packed_modules_mapping: ClassVar = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self) -> None:
        super().__init__()
        self.embed = Embedding()
        self.layers = torch.nn.ModuleList()
        for _ in range(NUM_LAYERS):
            self.layers.append(torch.nn.ModuleDict({"qkv_proj": Fused(), "q_norm": Norm()}))
        self.norm, self.lm_head = Norm(), Embedding()
        self.lm_head.weight = self.embed.weight
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            module_name, _, kind = name.rpartition(".")
            parent, _, own = module_name.rpartition(".")
            parts = self.packed_modules_mapping["qkv_proj"]
            shard = (parts.index(own),) if own in parts else ()
            module = self.get_submodule(f"{parent}.qkv_proj" if shard else module_name)
            parameter = getattr(module, kind)
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *shard)

    def holds(self) -> Parameters:
        """The weights that it computes with, under checkpoint names."""
        found = {"embed.weight": self.embed.weight[:VOCABULARY]}
        for index, layer in enumerate(self.layers):
            for shard, part in enumerate(self.packed_modules_mapping["qkv_proj"]):
                rows = slice(shard * WIDTH, (shard + 1) * WIDTH)
                for kind in ("weight", "bias"):
                    found[f"layers.{index}.{part}.{kind}"] = getattr(layer["qkv_proj"], kind)[rows]
            found[f"layers.{index}.q_norm.weight"] = layer["q_norm"].weight
        return {name: t.detach().clone() for name, t in found.items()} | {"norm.weight": self.norm.weight.clone()}


def random_weights(seed: int) -> Parameters:
    """A checkpoint of the model."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in Model().holds().items()}


def a_small_step(weights: Parameters, seed: int) -> Parameters:
    """What a step at a learning rate of 1e-6 makes of bf16 weights: about one in a hundred is another one."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in weights.items():
        change = torch.rand(tensor.shape, generator=generator) < 0.01
        change.view(-1)[0] = True
        moved[name] = torch.where(change, torch.nextafter(tensor, torch.full_like(tensor, 100.0)), tensor)
    return moved


class Source(WeightSource):
    def __init__(self, weights: Parameters, announced: Parameters | None = None) -> None:
        self._weights, self._announced = weights, weights if announced is None else announced

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self._announced.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._weights.items())


class Wire:
    """Carries buffers from one sender to several receivers.

    Attributes:
        damage: given a buffer and its number in the push, changes it on its way.
        sent: of every push, in order.
        delay_s: how long a buffer lies before it is read.
    """

    def __init__(self, num_workers: int = 1) -> None:
        self._queues: list[queue.Queue[torch.Tensor | None]] = [queue.Queue() for _ in range(num_workers)]
        self.damage: Callable[[torch.Tensor, int], None] = lambda buffer, index: None
        self.sent: list[torch.Tensor] = []
        self.delay_s = 0.0

    def sender_end(self) -> "SendingEnd":
        return SendingEnd(self._queues, self)

    def worker_end(self, rank: int) -> "ReceivingEnd":
        return ReceivingEnd(self._queues, rank)


class SendingEnd:
    device = CPU

    def __init__(self, queues: list[Any], wire: Wire) -> None:
        self._queues, self._wire = queues, wire
        self.aborted = False

    def broadcast(self, buffer: torch.Tensor) -> None:
        if self.aborted:
            raise RuntimeError("left")
        time.sleep(self._wire.delay_s)
        copy = buffer.clone()
        self._wire.damage(copy, len(self._wire.sent))
        self._wire.sent.append(copy)
        for waiting in self._queues:
            waiting.put(copy)

    def abort(self) -> None:
        self.aborted = True
        for waiting in self._queues:
            waiting.put(None)


class ReceivingEnd:
    device = CPU

    def __init__(self, queues: list[Any], rank: int) -> None:
        self._queue = queues[rank]
        self.aborted = False

    def broadcast(self, buffer: torch.Tensor) -> None:
        if (received := self._queue.get(timeout=20.0)) is None:
            raise RuntimeError("a peer is gone")
        buffer.copy_(received)

    def abort(self) -> None:
        self.aborted = True
        self._queue.put(None)


def receiver(backend: str = "distillserve_gloo", rank: int = 0) -> WeightReceiver:
    parallel = SimpleNamespace(data_parallel_index=0, world_size=8, rank=rank)
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
    return WeightReceiver(SimpleNamespace(backend=backend), config, CPU, Model())


def sender(port: int = 0, timeout_s: float = 20.0, bucket_bytes: int = 200) -> WeightSender:
    return WeightSender("gloo", "127.0.0.1", port, timeout_s, bucket_bytes, CPU)


def connected(num_workers: int = 1, bucket_bytes: int = 200) -> tuple[WeightSender, list[WeightReceiver], Wire]:
    """A sender and its workers on a wire."""
    wire, source_end = Wire(num_workers), sender(bucket_bytes=bucket_bytes)
    source_end._attach(wire.sender_end())
    workers = [receiver(rank=rank) for rank in range(num_workers)]
    for rank, worker in enumerate(workers):
        worker._attach(wire.worker_end(rank), 20.0)
    return source_end, workers, wire


class Stalled:
    """A channel in which nothing moves until it is left.

    Attributes:
        begun: set when a broadcast waits.
    """

    device = CPU

    def __init__(self) -> None:
        self.begun, self._left = threading.Event(), threading.Event()

    def broadcast(self, buffer: torch.Tensor) -> None:
        self.begun.set()
        assert self._left.wait(20.0)
        raise RuntimeError("left")

    def abort(self) -> None:
        self._left.set()


Report = dict[str, object]


def push(sender: WeightSender, workers: list[WeightReceiver], source: Source) -> list[Report]:
    """Everything up to the comparison, and the comparison; the workers' reports."""
    update = sender.update(source)
    for worker in workers:
        worker.start_weight_update()
    with ThreadPoolExecutor(len(workers)) as executor:
        received = [executor.submit(worker.receive_weights, update) for worker in workers]
        checksums = sender.send(source)
        for arrived in received:
            arrived.result()
    reports = [{"problem": None, **asdict(worker.receipt)} for worker in workers]
    check_arrival(update, checksums, [reports], ["http://a"])
    return reports


def assert_holds(worker: WeightReceiver, weights: Parameters) -> None:
    held = worker.model.holds()
    assert held.keys() == weights.keys()
    assert [name for name in held if not torch.equal(held[name], weights[name])] == []
