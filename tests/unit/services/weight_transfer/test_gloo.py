"""The bytes of a push: what one end packs the other unpacks, over a real gloo group."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from services.errors import WeightSyncError
from services.startup import free_port
from services.weight_transfer import gloo, trainer_engine
from services.weight_transfer.control import WeightControlClient
from services.weight_transfer.plugin import register
from services.weight_transfer.source import CheckpointSource
from tests.loopbacks import available_loopbacks
from tests.models import save_model

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).to(torch.bfloat16),  # 14 bytes: what follows is not aligned to 4
    "c": torch.randn(2, 2, 2),
    "d": torch.arange(5),
    "e": torch.randn(4, 6).t(),  # not contiguous
}
PARAMETERS = [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in TENSORS.items()]


@pytest.mark.parametrize("bucket_bytes", [1, 80, 10_000])
def test_what_is_packed_is_unpacked(bucket_bytes: int) -> None:
    tensors, found = iter(TENSORS.items()), {}
    for bucket in gloo.cut_into_buckets(PARAMETERS, bucket_bytes):
        assert len(bucket) == 1 or sum(map(gloo.num_bytes, bucket)) <= bucket_bytes
        found |= dict(gloo.unpack(gloo.pack(bucket, tensors), bucket))
    assert list(found) == list(TENSORS)
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in TENSORS)


def test_a_source_that_yields_something_else_is_an_error() -> None:
    (bucket,) = gloo.cut_into_buckets(PARAMETERS[:2], 10_000)
    for items in (
        [("a", torch.zeros(3, 4))],
        [("x", TENSORS["a"])],
        [("a", TENSORS["a"].double())],
        [("a", TENSORS["a"])],
    ):
        with pytest.raises(ValueError, match="where its metadata announces"):
            gloo.pack(bucket, iter(items))


@pytest.mark.parametrize("host", available_loopbacks())
def test_bytes_and_digest_travel_through_a_group(host: str) -> None:
    port = free_port(host, 0)
    packed = torch.randint(0, 256, (1000,), dtype=torch.uint8)

    def end(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = gloo.join_group(host, port, rank, 2, timeout_s=20.0)
        mine = packed if rank == 0 else torch.zeros_like(packed)
        digest = gloo.digest_of(packed) if rank == 0 else torch.zeros(16, dtype=torch.uint8)
        gloo.broadcast(group, mine)
        gloo.broadcast(group, digest)
        group.abort()
        return mine, digest

    with ThreadPoolExecutor(2) as executor:
        _, (received, digest) = executor.map(end, range(2))
    assert torch.equal(received, packed) and torch.equal(digest, gloo.digest_of(received))
    damaged = received.clone()
    damaged[500] ^= 1
    assert not torch.equal(gloo.digest_of(damaged), digest)


def test_workers_that_were_refused_are_not_waited_for() -> None:
    told: Future[None] = Future()
    told.set_exception(WeightSyncError("init_weight_transfer_engine on http://a answered 401"))
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match="answered 401"):
        gloo.join_group("127.0.0.1", free_port("127.0.0.1", 0), 0, 2, timeout_s=120.0, told=told)
    assert time.monotonic() - started < 30.0


def test_workers_that_do_not_come_are_said_to_be_missing() -> None:
    with pytest.raises(
        TimeoutError, match=r"0 of 2 workers .* came to 127\.0\.0\.1:\d+ within 0\.2 s; .*master_address"
    ):
        gloo.join_group("127.0.0.1", free_port("127.0.0.1", 0), 0, 3, timeout_s=0.2)


class Model(torch.nn.Module):
    """Stands for vLLM's model: keeps copies of what it is given, or refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.got: dict[str, torch.Tensor] = {}
        self.refuses = False

    def load_weights(self, weights) -> None:  # type: ignore[no-untyped-def]
        if self.refuses:
            raise RuntimeError("no such parameter")
        self.got |= {name: tensor.clone() for name, tensor in weights}


class Worker(gloo.GlooWeightTransferEngine):
    """A worker of a server of its own; what vLLM's layers do around an update is for the integration tests."""

    def __init__(self) -> None:
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        config = SimpleNamespace(parallel_config=parallel, model_config=None)
        super().__init__(None, config, torch.device("cpu"), Model())  # type: ignore[arg-type]
        self.finished_as: str | None = None

    def answer(self, stage: str, body: dict) -> None:
        if stage == "init_weight_transfer_engine":
            self.init_transfer_engine(self.parse_init_info(body["init_info"]))
        elif stage == "update_weights":
            self.update_weights(body["update_info"])
        elif stage == "finish_weight_update":
            self.finished_as = body["weight_version"]


class Source(WeightSource):
    def __init__(self, items: dict[str, torch.Tensor] = TENSORS) -> None:
        self.items = items

    def metadata(self) -> list[ParamMeta]:
        return PARAMETERS

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.items.items())


class Rig:
    """Two servers with one worker each, and the trainer's end, in one real group on this machine."""

    def __init__(self, source: Source, bucket_bytes: int = 64) -> None:
        self.workers = {"a": Worker(), "b": Worker()}
        transport = httpx.MockTransport(self._answer)
        self.client = WeightControlClient(["http://a", "http://b"], [1, 1], None, 20.0, transport)
        self.client.version = "9"
        info = gloo.GlooTrainerInitInfo(
            master_address="127.0.0.1",
            master_port=free_port("127.0.0.1", 0),
            world_size=3,
            timeout_s=20.0,
            bucket_bytes=bucket_bytes,
            rank=0,
        )
        self.trainer = gloo.GlooTrainerWeightTransferEngine.trainer_init(info, client=self.client, source=source)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        try:
            self.workers[request.url.host].answer(request.url.path.strip("/"), body)
        except RuntimeError as error:
            return httpx.Response(500, text=str(error))
        return httpx.Response(200)

    def close(self) -> None:
        self.trainer.shutdown()
        for worker in self.workers.values():
            worker.shutdown()
        self.client.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(Source())
    yield made
    made.close()


def test_a_push_reaches_the_workers_of_all_servers_bit_by_bit(rig: Rig) -> None:
    for version in ("9", "10"):
        rig.client.version = version
        rig.trainer.send_weights()
        for worker in rig.workers.values():
            assert worker.finished_as == version and list(worker.model.got) == list(TENSORS)
            assert all(torch.equal(worker.model.got[name], tensor) for name, tensor in TENSORS.items())
            worker.model.got.clear()


def test_a_worker_that_fails_ends_the_push_on_both_ends(rig: Rig) -> None:
    rig.workers["b"].model.refuses = True
    with pytest.raises((WeightSyncError, RuntimeError)):
        rig.trainer.send_weights()
    assert rig.trainer.group is None and rig.workers["b"].group is None
    assert [worker.finished_as for worker in rig.workers.values()] == [None, None]


@pytest.mark.parametrize(
    "items",
    [
        {name: TENSORS[name] for name in "abcd"},
        {**TENSORS, "f": torch.zeros(1)},
        {**TENSORS, "e": torch.zeros(4, 6)},
    ],
    ids=["too few", "too many", "another shape"],
)
def test_a_push_of_other_weights_than_announced_fails(items: dict[str, torch.Tensor]) -> None:
    rig = Rig(Source(items), bucket_bytes=10_000)
    try:
        with pytest.raises(ValueError, match="its metadata announces"):
            rig.trainer.send_weights()
        assert rig.trainer.group is None
        assert [worker.finished_as for worker in rig.workers.values()] == [None, None]
    finally:
        rig.close()


def test_damaged_weights_are_not_loaded() -> None:
    port = free_port("127.0.0.1", 0)
    worker = Worker()
    update = {
        "names": [p.name for p in PARAMETERS],
        "dtype_names": [str(p.dtype).removeprefix("torch.") for p in PARAMETERS],
        "shapes": [list(p.shape) for p in PARAMETERS],
    }

    def send() -> None:
        group = gloo.join_group("127.0.0.1", port, 0, 2, timeout_s=20.0)
        packed = gloo.pack(PARAMETERS, iter(TENSORS.items()))
        digest = gloo.digest_of(packed)
        packed[50] ^= 1
        gloo.broadcast(group, packed)
        gloo.broadcast(group, digest)
        group.abort()

    with ThreadPoolExecutor(1) as executor:
        sent = executor.submit(send)
        worker.init_transfer_engine(gloo.GlooInitInfo("127.0.0.1", port, 1, 2, 20.0, 10_000))
        with pytest.raises(RuntimeError, match="weights arrived damaged, between a and e"):
            worker.update_weights(update)
        sent.result()
    assert worker.model.got == {} and worker.group is None


def test_an_update_before_any_trainer_has_joined_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no trainer has joined"):
        Worker().update_weights({"names": [], "dtype_names": [], "shapes": []})


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_weights_leave_under_checkpoint_names_in_the_rollouts_dtype(architecture: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = save_model(tmp_path, architecture)
    saved = load_file(f"{folder}/model.safetensors")
    source = CheckpointSource(AutoModelForCausalLM.from_pretrained(folder), torch.bfloat16)
    sent = dict(source)
    assert set(sent) == set(saved) and ("lm_head.weight" in sent) == (architecture == "llama")
    assert all(torch.equal(sent[name], saved[name].bfloat16()) for name in saved)
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [(n, t.dtype, tuple(t.shape)) for n, t in source]


def test_registering_twice_is_harmless() -> None:
    register()
    register()
    assert "gloo" in WeightTransferEngineFactory._registry and "gloo" in WeightTransferTrainerFactory._registry


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_both_backends_go_through_vllms_factory(backend: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    captured = {}
    monkeypatch.setattr(
        WeightTransferTrainerFactory, "trainer_init", lambda info, **rest: captured.update(info=info, **rest)
    )
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "llama"))
    trainer_engine.build(
        backend,
        "the control client",  # type: ignore[arg-type]
        model,
        dtype=torch.bfloat16,
        address="10.0.0.1",
        port=7,
        world_size=3,
        timeout_s=5.0,
        bucket_bytes=99,
    )
    info = captured["info"]
    assert (info.backend, info.master_address, info.master_port, info.world_size) == (backend, "10.0.0.1", 7, 3)
    assert (info.bucket_bytes if backend == "gloo" else info.packed_buffer_size_bytes) == 99 and info.is_sender
    assert captured["client"] == "the control client" and isinstance(captured["source"], CheckpointSource)
