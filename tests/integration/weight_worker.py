"""What each worker of tests/integration/test_weight_receiver.py runs: vLLM's own model, without an engine around it."""

import json
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.weight_transfer.base import ParamMeta, layerwise_groups
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

from services.weight_transfer.buckets import cut_into_buckets, describe, unpack
from services.weight_transfer.receiver import WeightReceiver
from services.weight_transfer.worker import WeightUpdates
from tests.ranks import leave

CPU = torch.device("cpu")


class Worker(WeightUpdates):
    def __init__(self, config: VllmConfig, model: torch.nn.Module) -> None:
        backend: Any = SimpleNamespace(backend="distillserve_gloo")
        self.vllm_config = config
        self.weight_transfer_engine = WeightReceiver(backend, config, CPU, model)
        self.model_runner = SimpleNamespace(reset_lora_state=lambda: None)


class Buffers:
    """A channel that gives what was packed here."""

    device = CPU

    def __init__(self, buffers: list[torch.Tensor]) -> None:
        self._buffers = iter(buffers)

    def broadcast(self, buffer: torch.Tensor) -> None:
        buffer.copy_(next(self._buffers))

    def abort(self) -> None:
        pass


def push(worker: Worker, folder: str, without: Collection[str] = (), num_buffers: int | None = None) -> dict[str, Any]:
    """Start and receive a checkpoint in buckets of one layer; the report."""
    saved = load_file(f"{folder}/model.safetensors")
    names = [n for group in layerwise_groups(sorted(saved)) for n in group if n not in without]
    update = describe([ParamMeta(n, saved[n].dtype, tuple(saved[n].shape)) for n in names], bucket_bytes=1)
    buffers = []
    for bucket in cut_into_buckets(update):
        buffers.append(torch.zeros(bucket.num_bytes, dtype=torch.uint8))
        for name, place in unpack(buffers[-1], bucket):
            place.copy_(saved[name])
    worker.weight_transfer_engine._attach(Buffers(buffers[:num_buffers]), 60.0)
    assert worker.weights_start() == {"problem": None}
    return worker.weights_receive(asdict(update))


def differences(model: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    """Parameters that differ, and packed layers that give other products."""
    found = []
    for (name, ours), theirs in zip(model.named_modules(), other.modules(), strict=True):
        for kind, parameter in ours.named_parameters(recurse=False):
            expected = getattr(theirs, kind)
            if parameter.shape != expected.shape or not torch.equal(parameter, expected):
                found.append(f"{name}.{kind}")
        if hasattr(ours, "cpu_linear"):
            width = getattr(ours, "input_size_per_partition", None) or getattr(ours, "input_size", 0)
            rows = torch.randn(3, width or ours.weight.shape[1])
            products = [m.cpu_linear(rows, m.weight, getattr(m, "bias", None)) for m in (ours, theirs)]
            if not torch.equal(*products):
                found.append(f"{name}.cpu_linear")
    return found


def load(config: VllmConfig, folder: str) -> torch.nn.Module:
    config.model_config.model = folder
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


@torch.no_grad()
def main(rank: int, size: int, old: str, new: str, output: Path) -> None:
    _set_torch_accelerator_to_noop()
    arguments = EngineArgs(
        model=old,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        load_format="safetensors",
        tensor_parallel_size=size,
    )
    config = arguments.create_engine_config()
    config.parallel_config.rank = rank
    with set_current_vllm_config(config):
        init_distributed_environment(size, rank, f"file://{output / 'rendezvous'}", rank, "gloo")
        initialize_model_parallel(size, 1)
    model, fresh = load(config, old), load(config, new)
    worker = Worker(config, model)
    found: dict[str, Any] = {"before": differences(model, fresh)}
    found["report"] = push(worker, new)
    found["finish"] = worker.weights_finish("1.0@run")
    found["after"] = differences(model, fresh)
    found["missing"] = {}
    for name in load_file(f"{new}/model.safetensors"):
        found["missing"][name] = push(worker, new, without=[name])["missing"]
        worker.weights_discard()
    found["broken_off"] = push(worker, old, num_buffers=2)["problem"]
    found["discard"] = worker.weights_discard()
    found["mixed"] = differences(model, fresh)
    push(worker, new)
    worker.weights_finish("2.0@run")
    found["after_all"] = differences(model, fresh)
    (output / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], Path(sys.argv[5]))
    leave()
