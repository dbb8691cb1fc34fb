"""What no push can do without, each part alone: the bytes through gloo, vLLM's own loading, and packing a CPU's head.

`python -m tests.benchmarks.bare_push FOLDER BUCKET_BYTES ANSWER` writes the figures of each repeat to the file ANSWER, as JSON,
for results/push.json: seconds, and the memory that loading and packing take meanwhile.
"""

import json
import multiprocessing
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed import ProcessGroupGloo, TCPStore

from services.models.vllm_environment import vllm_defaults
from tests.benchmarks.memory import Memory

REPEATS = 5
PARTS = ("broadcast_s", "load_weights_s", "repack_s")
_ADDRESS = "127.0.0.1"


def broadcast_seconds(num_bytes: int, bucket_bytes: int) -> list[float]:
    """One process sends that many bytes to another, a bucket at a time from the same buffer into the same buffer."""
    store = TCPStore(_ADDRESS, 0, 2, is_master=True, wait_for_workers=False)
    receiver = multiprocessing.get_context("spawn").Process(target=_receive, args=(store.port, num_bytes, bucket_bytes))
    receiver.start()
    seconds = _broadcast_all(store, 0, num_bytes, bucket_bytes)
    receiver.join()
    return seconds


def _receive(port: int, num_bytes: int, bucket_bytes: int) -> None:
    _broadcast_all(TCPStore(_ADDRESS, port, 2, is_master=False), 1, num_bytes, bucket_bytes)


def _broadcast_all(store: TCPStore, rank: int, num_bytes: int, bucket_bytes: int) -> list[float]:
    options = ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=120)
    options._devices = [ProcessGroupGloo.create_device(hostname=_ADDRESS)]
    group = ProcessGroupGloo(store, rank, 2, options)
    buffer = torch.ones(bucket_bytes, dtype=torch.uint8)
    seconds = []
    for _ in range(REPEATS):
        group.barrier().wait()
        started = time.perf_counter()
        for begin in range(0, num_bytes, bucket_bytes):
            group.broadcast(buffer[: num_bytes - begin], 0).wait()
        group.barrier().wait()
        seconds.append(time.perf_counter() - started)
    return seconds


class Loading:
    """Added to vLLM's worker; `self` is the worker."""

    def load_again(self, folder: str) -> list[dict[str, float]]:
        """Load the model's own weights again, from memory."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        worker: Any = self
        model = worker.get_model()
        weights = {
            name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()
        }
        memory, found = Memory(os.getpid()), []
        for _ in range(REPEATS):
            held = memory.now()
            memory.reset()
            with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
                started = time.perf_counter()
                initialize_layerwise_reload(model)
                model.load_weights(iter(weights.items()))
                finalize_layerwise_reload(model, worker.model_config)
                loaded = time.perf_counter()
                _pack_tied_heads(model)
                packed = time.perf_counter()
            seconds = {"load_weights_s": loaded - started, "repack_s": packed - loaded}
            found.append(seconds | {"loading_extra_mib": memory.peak() - held})
        return found


def _pack_tied_heads(model: torch.nn.Module) -> None:
    """A tied head has no weights of its own in a checkpoint, so that vLLM does not pack it when it loads one."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def load_again(folder: str) -> list[dict[str, float]]:
    os.environ |= {name: value for name, value in vllm_defaults("float32").items() if name not in os.environ}
    from vllm import LLM

    extension = f"tests.benchmarks.bare_push.{Loading.__name__}"
    options = {"enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 1 << 30}
    llm = LLM(model=folder, dtype="float32", worker_extension_cls=extension, **options)
    (found,) = llm.collective_rpc("load_again", args=(folder,))
    return found


def main() -> None:
    folder, bucket_bytes = sys.argv[1], int(sys.argv[2])
    num_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    found = {"broadcast_s": broadcast_seconds(num_bytes, bucket_bytes)}
    loading = load_again(folder)
    found |= {name: [figures[name] for figures in loading] for name in loading[0]}
    Path(sys.argv[3]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
