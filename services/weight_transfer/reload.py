"""What a worker does to vLLM's layerwise reload before and after a push: two defects of vLLM 0.32 are repaired here.

See `repack_cpu_linears` and `discard_partial_update`.
"""

from typing import Any

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info


def is_reloading(model: torch.nn.Module) -> bool:
    """Whether an update was started and neither finished nor discarded: its layers are empty or half-filled."""
    return any(get_layerwise_info(layer).can_load() for layer in model.modules())


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
    repack_cpu_linears(model)


def repack_cpu_linears(model: torch.nn.Module) -> None:
    """Rebuild the packed GEMM weights of CPU linears from their current parameters.

    On CPU vLLM packs a layer's weight for oneDNN when it is loaded. A head that is tied to the embedding is
    never loaded again by the layerwise reload, so that its packed copy goes stale: wrong logits, no error.
    """
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "cpu_linear") and isinstance(weight, torch.Tensor) and weight.numel() > 0:
            quant_method: Any = layer.quant_method
            quant_method.process_weights_after_loading(layer)


def modules_without_weights(model: torch.nn.Module) -> list[str]:
    """Names of modules whose parameters are still to come in the update that is under way.

    Modules that hold only buffers (rotary tables) or that share all parameters with a loaded module (a tied
    head) never get weights of their own and are not missing.
    """
    waiting: dict[str, set[int]] = {}
    loaded: set[int] = set()
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        parameters = layer.parameters(recurse=False) if info.kernel_tensors is None else info.kernel_tensors[0].values()
        # By identity: a packed CPU linear keeps an empty weight, and all empty tensors share the address 0.
        own = {id(parameter) for parameter in parameters}
        if not info.can_load() or info.load_numel > 0:
            loaded |= own
        elif not is_deferred_attention_layer(layer):
            waiting[name] = own
    return [name for name, own in waiting.items() if own - loaded]
