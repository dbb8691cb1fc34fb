"""A worker's state around updates that fail: what it holds, what it says, and that the next push is whole."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from services.weight_transfer import receiver as receiver_module
from services.weight_transfer import reload
from services.weight_transfer.plugin import channel_class, engine_name, register
from services.weight_transfer.receiver import WeightReceiver
from services.weight_transfer.reload import is_reloading, repack_tied_heads, return_expert_kernels, take_expert_kernels
from services.weight_transfer.worker import WeightUpdates
from tests.unit.services.weight_transfer.pushes import (
    CPU,
    PADDED,
    Model,
    Source,
    Wire,
    assert_holds,
    connected,
    push,
    random_weights,
    receiver,
)


class Worker(WeightUpdates):
    """vLLM's worker, as far as the extension knows it."""

    def __init__(self, engine: WeightReceiver | None) -> None:
        self.weight_transfer_engine, self.vllm_config = engine, VllmConfig()
        self.adapters_were_reset = False
        self.model_runner = SimpleNamespace(reset_lora_state=lambda: setattr(self, "adapters_were_reset", True))


@pytest.fixture
def worker() -> Worker:
    return Worker(receiver())


def an_update(seed: int, bucket_bytes: int = 1) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What a trainer announces, and the buffers that it sends."""
    sender, workers, wire = connected(bucket_bytes=bucket_bytes)
    source = Source(random_weights(seed))
    push(sender, workers, source)
    return asdict(sender.update(source)), wire.sent


class Buffers:
    """A channel that gives these buffers, then fails."""

    device = CPU

    def __init__(self, buffers: list[torch.Tensor]) -> None:
        self._buffers: Iterator[torch.Tensor] = iter(buffers)
        self.aborted = False

    def broadcast(self, buffer: torch.Tensor) -> None:
        if (sent := next(self._buffers, None)) is None:
            raise RuntimeError("the trainer is gone\nand so is its stack")
        buffer.copy_(sent)

    def abort(self) -> None:
        self.aborted = True


def engine_of(worker: Worker) -> WeightReceiver:
    assert worker.weight_transfer_engine is not None
    return worker.weight_transfer_engine


def receive(worker: Worker, seed: int, num_buffers: int | None = None, bucket_bytes: int = 1) -> dict[str, Any]:
    update, sent = an_update(seed, bucket_bytes)
    engine_of(worker)._attach(Buffers(sent[:num_buffers]), 20.0)
    return worker.weights_receive(json.loads(json.dumps(update)))


def whole_push(worker: Worker, seed: int, label: str) -> None:
    assert worker.weights_start() == {"problem": None}
    assert receive(worker, seed)["problem"] is None
    assert worker.weights_finish(label) == {"problem": None}


def test_what_a_worker_says_of_a_push_can_be_json(worker: Worker) -> None:
    before = worker.weights_status()
    assert before["label"] is None and before["update"] == "none" and before["connected"] is False
    worker.weights_start()
    assert worker.weights_status()["update"] == "started"
    report = json.loads(json.dumps(receive(worker, 1)))
    weights = random_weights(1)
    assert report["problem"] is None and report["missing"] == [] and len(report["checksums"]) == 5
    assert report["parameters_received"] == len(weights)
    assert worker.weights_status()["update"] == "received" and worker.weights_status()["connected"] is True
    assert worker.weights_finish("1.0@run") == {"problem": None} and worker.adapters_were_reset
    after = json.loads(json.dumps(worker.weights_status()))
    assert (after["label"], after["update"], after["problem"]) == ("1.0@run", "none", None)
    assert after["bytes_received"] == report["bytes_received"] and after["boot_id"] == before["boot_id"]
    assert Worker(receiver()).weights_status()["boot_id"] != before["boot_id"]


@pytest.mark.parametrize("num_buffers", range(5))
def test_an_update_that_breaks_off_is_reported_discarded_and_followed_by_a_whole_one(
    worker: Worker, num_buffers: int
) -> None:
    whole_push(worker, 0, "0.0@run")
    worker.weights_start()
    report = receive(worker, 1, num_buffers)
    assert report["problem"] == "RuntimeError: the trainer is gone" and len(report["checksums"]) == num_buffers
    status = worker.weights_status()
    assert status["problem"] == report["problem"] and not status["connected"] and status["update"] == "started"
    assert "no update was received" in worker.weights_finish("1.0@run")["problem"]
    assert worker.weights_discard() == {"problem": None, "changed": num_buffers > 0}
    assert worker.weights_status()["label"] == (None if num_buffers else "0.0@run")
    assert not is_reloading(engine_of(worker).model)
    assert worker.weights_discard() == {"problem": None, "changed": False}
    whole_push(worker, 2, "2.0@run")
    assert_holds(engine_of(worker), random_weights(2))


def test_layers_that_were_not_complete_return_to_their_old_weights(worker: Worker) -> None:
    whole_push(worker, 0, "0.0@run")
    worker.weights_start()
    receive(worker, 1, 2)  # the embedding and the first layer
    worker.weights_discard()
    held, old, new = engine_of(worker).model.holds(), random_weights(0), random_weights(1)
    for name, tensor in held.items():
        expected = new if name.startswith(("embed", "layers.0")) else old
        assert torch.equal(tensor, expected[name]), name


def test_a_bias_that_came_before_the_rest_of_its_layer_counts_as_changed(worker: Worker) -> None:
    """vLLM writes a bias where the model computes with it, before the layer is complete."""
    engine = engine_of(worker)
    whole_push(worker, 0, "0.0@run")
    worker.weights_start()
    assert engine._arrivals is not None
    with engine._arrivals.recording(), torch.no_grad():
        engine.model.load_weights([("layers.0.q_proj.bias", random_weights(1)["layers.0.q_proj.bias"])])
    assert worker.weights_discard()["changed"] and worker.weights_status()["label"] is None


def fill_half_a_layer(worker: Worker) -> None:
    """Start an update, and break it off between two tensors of one fused layer."""
    assert worker.weights_start() == {"problem": None}
    with torch.no_grad():
        engine_of(worker).model.load_weights([("layers.0.q_proj.weight", random_weights(1)["layers.0.q_proj.weight"])])


def test_half_a_layer_is_forgotten_when_it_is_discarded(worker: Worker) -> None:
    whole_push(worker, 0, "0.0@run")
    fill_half_a_layer(worker)
    assert worker.weights_discard()["problem"] is None
    assert_holds(engine_of(worker), random_weights(0))


def test_a_start_discards_half_a_layer_that_nobody_discarded(worker: Worker) -> None:
    whole_push(worker, 0, "0.0@run")
    fill_half_a_layer(worker)
    assert worker.weights_start() == {"problem": None}
    assert get_layerwise_info(engine_of(worker).model.layers[0]["qkv_proj"]).loaded_weights == []


def test_an_update_that_nobody_finished_does_not_stop_the_next(worker: Worker) -> None:
    for seed in (0, 1):
        worker.weights_start()
        receive(worker, seed, 3)
    whole_push(worker, 2, "2.0@run")
    assert_holds(engine_of(worker), random_weights(2))


def test_parameters_that_never_came_forbid_the_finish(worker: Worker) -> None:
    worker.weights_start()
    update, sent = an_update(1)
    update = {key: value[:-1] if isinstance(value, list) else value for key, value in update.items()}
    engine_of(worker)._attach(Buffers(sent[:-1]), 20.0)
    report = worker.weights_receive(update)
    assert report["problem"] is None and report["missing"] == ["norm.weight"]
    assert worker.weights_finish("1.0@run")["problem"] == "RuntimeError: no weights came for norm.weight"


@pytest.mark.parametrize(
    "update",
    [
        {},
        {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]], "bucket_bytes": 1, "more": 1},
        {"names": ["a"], "dtype_names": ["module"], "shapes": [[1]], "bucket_bytes": 1},
        {"names": [1], "dtype_names": ["float32"], "shapes": [[1]], "bucket_bytes": 1},
        {"names": ["a"], "dtype_names": [None], "shapes": [[1]], "bucket_bytes": 1},
        {"names": ["a"], "dtype_names": ["float32"], "shapes": [["1"]], "bucket_bytes": 1},
        {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]], "bucket_bytes": None},
        {"names": ["embed.weight"], "dtype_names": ["float32"], "shapes": [[9, 9]], "bucket_bytes": 1},
        {"names": ["nobody.weight"], "dtype_names": ["float32"], "shapes": [[1]], "bucket_bytes": 1},
    ],
)
def test_no_update_makes_a_worker_raise(worker: Worker, update: dict[str, Any]) -> None:
    worker.weights_start()
    channel = Buffers([torch.zeros(324, dtype=torch.uint8)[:size] for size in (4,)])
    engine_of(worker)._attach(channel, 20.0)
    assert worker.weights_receive(update)["problem"]
    assert worker.weights_discard()["problem"] is None
    whole_push(worker, 0, "0.0@run")


@pytest.mark.parametrize("rendezvous", [{}, {"master_address": 1}, {"address": "a"}])
def test_no_rendezvous_makes_a_worker_raise(worker: Worker, rendezvous: dict[str, Any]) -> None:
    assert worker.weights_connect(rendezvous)["problem"]


def test_stages_out_of_their_order_are_refused(worker: Worker) -> None:
    assert "has joined no trainer" in worker.weights_receive(an_update(0)[0])["problem"]
    assert "no update was started" in receive(worker, 0)["problem"]
    assert "no update was received" in worker.weights_finish("0.0@run")["problem"]
    assert worker.weights_disconnect() == {"problem": None} and worker.weights_disconnect() == {"problem": None}


def test_a_server_without_a_weight_transfer_engine_says_so_and_does_not_raise() -> None:
    worker = Worker(None)
    for call in (worker.weights_start, worker.weights_discard, worker.weights_status, worker.weights_disconnect):
        assert "NoneType" in call()["problem"]
    assert worker.weights_receive({})["problem"] and worker.weights_finish("a")["problem"]


def test_a_second_trainer_takes_the_place_of_the_first(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    first, wire = Buffers([]), Wire()
    engine_of(worker)._attach(first, 20.0)
    joined = []
    monkeypatch.setattr(receiver_module, "join_store", lambda rendezvous: "the store")
    monkeypatch.setattr(
        receiver_module,
        "channel_class",
        lambda backend: lambda *made: joined.append((backend, made)) or wire.worker_end(0),
    )
    body = {"master_address": "a", "master_port": 1, "rank_offset": 3, "world_size": 5, "timeout_s": 20.0}
    assert worker.weights_connect(body) == {"problem": None} and first.aborted
    ((backend, (store, rendezvous, rank, device)),) = joined
    assert (backend, store, rendezvous.world_size, rank, device) == ("distillserve_gloo", "the store", 5, 3, CPU)


def test_ranks_follow_data_and_tensor_parallel_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = []
    monkeypatch.setattr(receiver_module, "join_store", lambda rendezvous: None)
    monkeypatch.setattr(
        receiver_module, "channel_class", lambda backend: lambda *made: ranks.append(made[2]) or Buffers([])
    )
    for replica in range(2):
        for rank in range(2):
            parallel = SimpleNamespace(data_parallel_index=replica, world_size=2, rank=rank)
            config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
            engine = WeightReceiver(SimpleNamespace(backend="distillserve_gloo"), config, CPU, Model())
            engine.init_transfer_engine(receiver_module.Rendezvous("a", 1, 4, 8, 20.0))
    assert ranks == [4, 5, 6, 7]


def test_a_layer_that_waits_for_more_keeps_a_copy_of_what_the_buffer_held(worker: Worker) -> None:
    engine = engine_of(worker)
    worker.weights_start()
    assert engine._arrivals is not None
    buffer = torch.full((32,), 1, dtype=torch.uint8)
    with engine._arrivals.recording(), torch.no_grad():
        engine.model.load_weights([("layers.0.q_proj.weight", buffer.view(torch.bfloat16).view(4, 4))])
    engine._arrivals.release(buffer)
    (call,) = get_layerwise_info(engine.model.layers[0]["qkv_proj"]).loaded_weights
    buffer.fill_(2)
    assert (call[1].arguments["loaded_weight"].view(torch.uint8) == 1).all()


def test_a_padded_layer_is_loaded_when_its_bucket_is_and_keeps_no_copy(worker: Worker) -> None:
    engine = engine_of(worker)
    worker.weights_start()
    receive(worker, 1, 1)
    assert not get_layerwise_info(engine.model.embed).can_load()
    assert (engine.model.embed.weight[6:] == 0).all()


def test_a_bias_that_is_copied_onto_itself_has_not_come(worker: Worker) -> None:
    """As vLLM does when it takes a layer for complete."""
    engine = engine_of(worker)
    worker.weights_start()
    assert engine._arrivals is not None
    bias = engine.model.layers[0]["qkv_proj"].bias
    with engine._arrivals.recording(), torch.no_grad():
        bias.data.copy_(bias.data)
    assert "layers.0.q_proj.bias" in engine._arrivals.missing([])


class Packing:
    """A quantisation method that counts how often it packs a layer."""

    def __init__(self) -> None:
        self.packed: list[torch.nn.Module] = []
        self.moe_kernel: object | None = "kernel"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.packed.append(layer)


@pytest.fixture
def tied_head(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model whose head vLLM would know as one."""
    model = Model()
    head = type("Head", (type(model.lm_head),), {})
    model.lm_head.__class__ = head
    monkeypatch.setattr(reload, "ParallelLMHead", head)
    return model


def test_only_a_tied_head_is_packed_again(tied_head: Model) -> None:
    method = Packing()
    for layer in (tied_head.lm_head, tied_head.embed, tied_head.layers[0]["qkv_proj"], tied_head.norm):
        layer.cpu_linear, layer.quant_method = "packed", method
    repack_tied_heads(tied_head)
    assert method.packed == [tied_head.lm_head]


@pytest.mark.parametrize("bias", [None, torch.zeros(PADDED)])
def test_a_tied_head_computes_with_what_was_packed_of_the_embedding(
    tied_head: Model, bias: torch.Tensor | None
) -> None:
    method = Packing()
    tied_head.embed.cpu_linear, tied_head.lm_head.cpu_linear = "new", "stale"
    tied_head.lm_head.quant_method, tied_head.lm_head.bias = method, bias  # which may be packed with the weight
    repack_tied_heads(tied_head)
    assert (tied_head.lm_head.cpu_linear, len(method.packed)) == (("new", 0) if bias is None else ("stale", 1))


@pytest.mark.parametrize("quantised", [False, True])
def test_an_embedding_is_loaded_where_it_is_served_unless_it_is_quantised(worker: Worker, quantised: bool) -> None:
    model: Any = engine_of(worker).model
    if quantised:
        model.embed.quant_method = model.lm_head.quant_method = Packing()
    served = model.embed.weight
    for seed in range(3):
        worker.weights_start()
        assert (model.embed.weight is served) is not quantised and model.layers[0]["qkv_proj"].weight.is_meta
        assert receive(worker, seed)["missing"] == []
        assert worker.weights_finish(f"{seed}.0@run") == {"problem": None}
        assert model.embed.weight is served and model.lm_head.weight is served
        assert_holds(engine_of(worker), random_weights(seed))


def test_experts_get_a_new_kernel_or_their_old_one_back() -> None:
    model, loaded, waiting = Model(), Packing(), Packing()
    model.norm.quant_method, model.embed.quant_method = loaded, waiting
    kernels = take_expert_kernels(model)
    assert loaded.moe_kernel is None and waiting.moe_kernel is None
    loaded.moe_kernel = "a new kernel"
    return_expert_kernels(kernels)
    assert (loaded.moe_kernel, waiting.moe_kernel) == ("a new kernel", "kernel")


def test_registering_twice_is_harmless() -> None:
    register()
    register()
    names = [engine_name(backend) for backend in ("gloo", "nccl")]
    assert names == ["distillserve_gloo", "distillserve_nccl"]
    assert [WeightTransferEngineFactory._registry[name]() for name in names] == [WeightReceiver] * 2


@pytest.mark.parametrize("backend", ["gloo", "distillserve_gloo"])
def test_a_backend_is_known_by_our_name_and_by_vllms(backend: str) -> None:
    assert channel_class(backend).__name__ == "GlooChannel"
