"""Pushes over nccl from the project's sender to its receivers, with a recording communicator in the place of vLLM's.

The workers are threads here, each with the model of one tensor-parallel rank; their layers are reloaded by vLLM for real.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightSource
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from services.errors import WeightSyncError
from services.weight_transfer import nccl
from services.weight_transfer.channel import Rendezvous, Update
from services.weight_transfer.receiver import WeightReceiver
from services.weight_transfer.sender import WeightSender, check_arrival
from tests.unit.services.weight_transfer.pushes import Source, a_small_step
from tests.unit.services.weight_transfer.recording_nccl import RecordingNccl

HIDDEN, VOCABULARY = 16, 6
BUCKET_BYTES = 1200
"""Room for one layer and the last norm, but not for the embedding and a layer."""


class Shard(torch.nn.Module):
    """A matrix of which each tensor-parallel rank holds some rows."""

    def __init__(self, num_rows: int, rank: int, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(num_rows // size, HIDDEN, dtype=torch.bfloat16))
        set_weight_attrs(self.weight, {"weight_loader": self.load})
        self.rank = rank

    def load(self, param: Tensor, loaded: Tensor) -> None:
        param.data.copy_(self.of(loaded))

    def of(self, whole: Tensor) -> Tensor:
        return whole.narrow(0, self.rank * self.weight.shape[0], self.weight.shape[0])


class Whole(torch.nn.Module):
    """A parameter that every rank holds."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))

    def of(self, whole: Tensor) -> Tensor:
        return whole


class Layer(torch.nn.Module):
    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.norm, self.projection = Whole(HIDDEN), Shard(2 * HIDDEN, rank, size)


class Model(torch.nn.Module):
    """One worker's; notes the names that it is given."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.embedding = Whole(VOCABULARY, HIDDEN)
        self.layers = torch.nn.ModuleList([Layer(rank, size) for _ in range(3)])
        self.norm = Whole(HIDDEN)
        self.names: list[str] = []
        record_metadata_for_reloading(self)

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            self.names.append(name)
            loader = getattr(parameters[name], "weight_loader", default_weight_loader)
            loader(parameters[name], tensor)

    def holds(self, checkpoint: dict[str, Tensor]) -> bool:
        """Whether each parameter is this rank's part of the checkpoint's."""
        modules: dict[str, Any] = dict(self.named_modules())
        return all(
            torch.equal(modules[name.removesuffix(".weight")].of(checkpoint[name]), parameter)
            for name, parameter in self.named_parameters()
        )


# Bytes in bfloat16: 192, then 32 and 1024 for each of three layers, then 32.
SHAPES = {
    "embedding.weight": (VOCABULARY, HIDDEN),
    **{
        f"layers.{i}.{name}.weight": shape
        for i in range(3)
        for name, shape in (("norm", (HIDDEN,)), ("projection", (2 * HIDDEN, HIDDEN)))
    },
    "norm.weight": (HIDDEN,),
}


class Server:
    """The workers of one rollout server."""

    def __init__(self, url: str, tensor_parallel: int, data_parallel: int) -> None:
        self.url = url
        self.workers = [
            self._worker(data_rank, tensor_rank, tensor_parallel)
            for data_rank in range(data_parallel)
            for tensor_rank in range(tensor_parallel)
        ]

    def _worker(self, data_rank: int, tensor_rank: int, tensor_parallel: int) -> WeightReceiver:
        parallel = SimpleNamespace(data_parallel_index=data_rank, world_size=tensor_parallel, rank=tensor_rank)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        backend: Any = SimpleNamespace(backend="nccl")
        return WeightReceiver(backend, config, torch.device("cpu"), Model(tensor_rank, tensor_parallel))


class Rig:
    """A trainer's sender and several servers in one group."""

    def __init__(self, servers: list[Server], timeout_s: float) -> None:
        self.servers = servers
        self.workers = [worker for server in servers for worker in server.workers]
        self.sender = WeightSender("nccl", "127.0.0.1", 0, timeout_s, BUCKET_BYTES, torch.device("cpu"))
        self._executor = ThreadPoolExecutor(len(self.workers))

    def connect(self) -> None:
        self.sender.connect(self._tell, 1 + len(self.workers))

    def _tell(self, body: dict[str, Any]) -> None:
        joining, offset = [], 1
        for server in self.servers:
            rendezvous = Rendezvous(**{**body, "rank_offset": offset})
            joining += [self._executor.submit(worker.init_transfer_engine, rendezvous) for worker in server.workers]
            offset += len(server.workers)
        for join in joining:
            join.result()

    def push(self, source: WeightSource, label: str) -> None:
        """As the trainer does it: nobody finishes before all reports have been compared."""
        update = self.sender.update(source)
        self.in_every_worker(lambda worker: worker.start_weight_update())
        receiving = [self._executor.submit(_receive, worker, update) for worker in self.workers]
        checksums = self.sender.send(source)
        flat = iter([call.result() for call in receiving])
        reports = [[next(flat) for _ in server.workers] for server in self.servers]
        check_arrival(update, checksums, reports, [server.url for server in self.servers])
        self.in_every_worker(lambda worker: worker.finish_weight_update(label))

    def in_every_worker(self, call: Callable[[WeightReceiver], object]) -> None:
        list(self._executor.map(call, self.workers))

    def labels(self) -> set[str | None]:
        return {worker.label for worker in self.workers}

    def close(self) -> None:
        self.sender.abort()
        self.in_every_worker(lambda worker: worker.shutdown())
        self._executor.shutdown()


def _receive(worker: WeightReceiver, update: Update) -> dict[str, Any]:
    worker.receive_weights(update)
    return {"problem": None, **asdict(worker.receipt)}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordingNccl:
    recorded = RecordingNccl()
    monkeypatch.setattr(nccl, "PyNcclCommunicator", recorded.communicator)
    return recorded


@contextmanager
def connected(*servers: Server, timeout_s: float = 20.0) -> Iterator[Rig]:
    with ExitStack() as stack:
        rig = Rig(list(servers), timeout_s)
        stack.callback(rig.close)
        rig.connect()
        yield rig


def checkpoint(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in SHAPES.items()}


def bits_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_three_servers_of_mixed_parallel_size_get_every_tensor_in_order(recorded: RecordingNccl) -> None:
    servers = [Server("http://a", 2, 1), Server("http://b", 1, 2), Server("http://c", 2, 2)]
    with connected(*servers) as rig:
        for version in range(3):
            weights = checkpoint(version)
            rig.push(Source(weights), f"{version}.1@run")
            assert all(worker.model.holds(weights) for worker in rig.workers)
            assert rig.labels() == {f"{version}.1@run"}
    # Ranks by hand: the trainer, a's two, b's two, c's four, its first engine's two before its second's.
    assert sorted(call.rank for call in recorded.calls if call.name == "init") == list(range(9))
    assert [worker.model.layers[0].projection.rank for worker in rig.workers] == [0, 1, 0, 0, 0, 1, 0, 1]
    for worker in rig.workers:
        assert worker.model.names == list(SHAPES) * 3
    for rank in range(9):
        # The embedding alone, a layer each, the third with the last norm.
        assert [call.num_bytes for call in recorded.of(rank, "broadcast")] == [192, 1056, 1056, 1088] * 3


def test_a_bucket_holds_its_tensors_one_after_the_other(recorded: RecordingNccl) -> None:
    weights = checkpoint(0)
    with connected(Server("http://a", 1, 1)) as rig:
        rig.push(Source(weights), "0.1@run")
    embedding, first, _, last = recorded.sent
    assert embedding == bits_of(weights["embedding.weight"])
    assert first[:32] == bits_of(weights["layers.0.norm.weight"])
    assert first[32:] == bits_of(weights["layers.0.projection.weight"])
    assert last[32:1056] == bits_of(weights["layers.2.projection.weight"])
    assert last[1056:] == bits_of(weights["norm.weight"])


def test_each_worker_has_the_rank_behind_those_before_it(recorded: RecordingNccl) -> None:
    """A byte that is damaged on the way to rank 6 is reported by the second worker of the third server."""
    servers = [Server("http://a", 2, 1), Server("http://b", 1, 2), Server("http://c", 2, 2)]
    recorded.damage = lambda rank, number, arrived: flip(arrived, 5) if (rank, number) == (6, 2) else None
    with connected(*servers) as rig, pytest.raises(WeightSyncError, match=r"worker 1 of http://c: .*layers\.1\."):
        rig.push(Source(checkpoint(0)), "0.1@run")


def flip(arrived: Tensor, byte: int) -> None:
    arrived[byte] ^= 1


NAMES = list(SHAPES)


@pytest.mark.parametrize("case", range(20))
def test_a_withheld_tensor_is_refused_before_finish_and_named(recorded: RecordingNccl, case: int) -> None:
    name = NAMES[case % len(NAMES)]
    old = checkpoint(case)
    new = a_small_step(old, case)
    with connected(Server("http://a", 2, 1)) as rig:
        rig.push(Source(old), "0.1@run")
        with pytest.raises(WeightSyncError, match=rf"worker 0 of http://a: .*\b{name}"):
            rig.push(Source({k: v for k, v in new.items() if k != name}), "1.1@run")
        assert "1.1@run" not in rig.labels()


@pytest.mark.parametrize("case", range(20))
def test_a_stale_tensor_is_refused_before_finish_and_named(recorded: RecordingNccl, case: int) -> None:
    """The bytes of the push before, in the place of one tensor, in every worker."""
    name = NAMES[case % len(NAMES)]
    old = checkpoint(case)
    new = a_small_step(old, case)
    fresh, stale = bits_of(new[name]), bits_of(old[name])

    def replace(rank: int, number: int, arrived: Tensor) -> None:
        start = arrived.numpy().tobytes().find(fresh)
        if start >= 0:
            arrived[start : start + len(stale)] = torch.frombuffer(bytearray(stale), dtype=torch.uint8)

    with connected(Server("http://a", 2, 1)) as rig:
        rig.push(Source(old), "0.1@run")
        recorded.damage = replace
        with pytest.raises(WeightSyncError, match=r"worker 0 of http://a: .* did not arrive as they were sent"):
            rig.push(Source(new), "1.1@run")
        assert "1.1@run" not in rig.labels()


@pytest.mark.parametrize("case", range(20))
def test_a_flipped_byte_in_one_worker_is_refused_before_finish(recorded: RecordingNccl, case: int) -> None:
    old = checkpoint(case)
    with connected(Server("http://a", 2, 1)) as rig:
        rig.push(Source(old), "0.1@run")
        recorded.damage = lambda rank, number, arrived: (
            flip(arrived, (37 * case) % arrived.numel()) if (rank, number) == (2, 4 + case % 4) else None
        )
        with pytest.raises(WeightSyncError, match=r"worker 1 of http://a: .* did not arrive as they were sent"):
            rig.push(Source(a_small_step(old, case)), "1.1@run")
        assert "1.1@run" not in rig.labels()


def test_a_push_after_a_refused_one_brings_the_new_weights_to_all(recorded: RecordingNccl) -> None:
    recorded.damage = lambda rank, number, arrived: flip(arrived, 3) if (rank, number) == (1, 1) else None
    weights = checkpoint(0)
    with connected(Server("http://a", 2, 1), Server("http://b", 1, 2)) as rig:
        with pytest.raises(WeightSyncError):
            rig.push(Source(weights), "0.1@run")
        recorded.damage = None
        rig.connect()
        rig.push(Source(weights), "0.2@run")
        assert all(worker.model.holds(weights) for worker in rig.workers) and rig.labels() == {"0.2@run"}


def test_a_worker_that_hangs_ends_the_push_at_the_deadline_and_the_next_one_works(recorded: RecordingNccl) -> None:
    weights = checkpoint(0)
    with connected(Server("http://a", 2, 1), timeout_s=2.0) as rig:
        recorded.absent = {2}
        with pytest.raises(TimeoutError):
            rig.push(Source(weights), "0.1@run")
        recorded.absent = set()
        rig.connect()
        rig.push(Source(weights), "0.2@run")
        assert all(worker.model.holds(weights) for worker in rig.workers) and rig.labels() == {"0.2@run"}
