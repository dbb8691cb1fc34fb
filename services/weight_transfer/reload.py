"""What a worker does to vLLM's layerwise reload before and after a push: three defects of vLLM 0.32 are repaired here.

See `repack_tied_heads`, `take_expert_kernels` and `discard_partial_update`; `load_embeddings_in_place` saves memory and time.
"""

from collections import defaultdict
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors,
    get_layerwise_info,
    initialize_online_processing,
)


def is_reloading(model: torch.nn.Module) -> bool:
    """Whether an update was started and neither finished nor discarded: its layers are empty or half-filled."""
    return any(get_layerwise_info(layer).can_load() for layer in model.modules())


def load_embeddings_in_place(model: torch.nn.Module) -> None:
    """After `initialize_layerwise_reload`, let what comes for an embedding, or an untied head, be written where it is served.

    The layerwise reload would make a second tensor of it and copy that. An embedding is often the largest tensor of all, and
    to a CPU the page faults of new memory cost more than the copies. Quantised ones are left to vLLM.
    """
    placed: set[int] = set()  # a tied head has no weights of its own
    for layer in model.modules():
        if not isinstance(getattr(layer, "quant_method", None), UnquantizedEmbeddingMethod):
            continue
        info = get_layerwise_info(layer)
        served = {} if info.kernel_tensors is None else info.kernel_tensors[0]
        if "weight" in served and id(served["weight"]) not in placed:
            placed.add(id(served["weight"]))
            _place_kernel_tensors(layer, info)
            initialize_online_processing(layer)


def discard_partial_update(model: torch.nn.Module, model_config: Any) -> None:
    """Forget what an aborted push buffered, and leave the reloading state of every layer.

    vLLM keeps half-filled layers after a failed update; the next initialize_layerwise_reload skips them, so
    that push would load only what is missing and leave mixed, partly uninitialised weights. Layers that were
    complete keep the new weights, the others return to the old ones: the model is mixed until the next full
    push, and the trainer accepts no sample before it.
    """
    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.loaded_weights.clear()
        info.load_numel = 0
    finalize_layerwise_reload(model, model_config)
    repack_tied_heads(model)


def repack_tied_heads(model: torch.nn.Module) -> None:
    """Renew the packed GEMM weights of a head that shares its parameter with the embedding.

    On CPU vLLM packs a layer's weight for oneDNN when it is loaded. A head that is tied to the embedding is never loaded
    again by the layerwise reload, so that its packed copy goes stale: wrong logits, no error. Every other layer was packed
    when it was loaded, the embedding included, for which nothing asks: the head computes with that copy.
    """
    # By identity: a packed layer keeps an empty weight, and all empty tensors share the address 0.
    users: dict[int, list[torch.nn.Module]] = defaultdict(list)
    for layer in model.modules():
        if (weight := getattr(layer, "weight", None)) is not None:
            users[id(weight)].append(layer)
    for head in model.modules():
        if not isinstance(head, ParallelLMHead) or not hasattr(head, "cpu_linear"):
            continue
        tied = [layer for layer in users[id(head.weight)] if layer is not head]
        packed = [
            layer for layer in tied if isinstance(getattr(layer, "quant_method", None), UnquantizedEmbeddingMethod)
        ]
        if packed and getattr(head, "bias", None) is None:
            head.cpu_linear = packed[0].cpu_linear
        elif tied:
            quant_method: Any = head.quant_method
            quant_method.process_weights_after_loading(head)


def take_expert_kernels(model: torch.nn.Module) -> dict[torch.nn.Module, Any]:
    """Before an update on CPU, take away the kernel of every mixture of experts, so that vLLM makes a new one.

    On CPU vLLM pads and packs the experts' weights when it makes their kernel, and not again when it loads them anew: they
    would be read as packed although they are not. Give what is returned to `return_expert_kernels` when the update ends.
    """
    kernels = {}
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            kernels[layer], method.moe_kernel = method.moe_kernel, None
    return kernels


def return_expert_kernels(kernels: dict[torch.nn.Module, Any]) -> None:
    """After an update: a layer that was not loaded gets its kernel back."""
    for layer, kernel in kernels.items():
        method: Any = layer.quant_method
        method.moe_kernel = method.moe_kernel or kernel
