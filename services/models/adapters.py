"""LoRA adapters that peft has put into a model: which modules have one, and the weights that they come to.

peft keeps a module's own weight as `base_layer` and two matrices of low rank beside it. Everybody else (vLLM, a checkpoint,
the fused output head) wants one weight: W + scale * B A, with DoRA each row of it brought to a trained length. It is computed
here, out of place: merging into the model and taking it out again would leave rounding in weights that must not change.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"
"""The name that peft gives to the only adapter of a model."""

_BASE, _SAVED, _ORIGINAL = ".base_layer.", f".modules_to_save.{ADAPTER}.", ".original_module."


def without_memory(parameter: Tensor) -> Tensor:
    """On the meta device, the dtype and the shape of what a parameter stands for: in four bits (bitsandbytes) two numbers are in
    a byte."""
    state = getattr(parameter, "quant_state", None)
    known = parameter if state is None else state
    return torch.empty(known.shape, dtype=known.dtype, device="meta")


def unpacked(parameter: Tensor) -> Tensor:
    """A parameter as the numbers that it stands for."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit  # not installed where nobody has asked for it

    found: Tensor = dequantize_4bit(parameter.data, state)
    return found


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter of the model is trained, and not the model itself."""
    return hasattr(model, "peft_config")


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """By name, the modules that have low-rank matrices of their own."""
    return {name: module for name, module in model.named_modules() if _factors(module) is not None}


def effective_weight(module: Any) -> Tensor:
    """The weight that a module acts with; the gradient reaches its adapter where it has one."""
    factors = _factors(module)
    if factors is None:
        weight: Tensor = module.weight
        return weight
    return _effective(module, dict(module.named_parameters()), torch.promote_types(factors[0].dtype, torch.float32))


def merge(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a model with an adapter as those of one without.

    Args:
        tensors: whole, by their names in the model; an adapter's with those of its module. Taken out one by one.

    Yields:
        names as they are without an adapter, and tensors: merged ones in float32 at least, all others as they are.
    """
    for name in list(tensors):
        if _ORIGINAL in name:  # another one is trained in its place
            del tensors[name]
        elif _SAVED in name:
            yield name.replace(_SAVED, "."), tensors.pop(name)
        elif name.endswith(f"{_BASE}weight") and _factors(model.get_submodule(of := _owner(name))) is not None:
            yield f"{of}.weight", _effective(model.get_submodule(of), _taken(tensors, f"{of}."), torch.float32)
        elif _BASE in name:
            if name in tensors:
                yield name.replace(_BASE, "."), tensors.pop(name)
        elif name in tensors and ".lora_" not in name:
            yield name, tensors.pop(name)
    assert not tensors, f"parts of an adapter without the module that they belong to: {', '.join(tensors)}"


def plain_name(name: str) -> str:
    """The name that a parameter with a place of its own in a checkpoint has without an adapter."""
    return name.replace(_SAVED, ".").replace(_BASE, ".")


def is_low_rank(name: str) -> bool:
    """Whether a parameter's name is that of a part of an adapter, which is merged."""
    return ".lora_" in name


def _owner(name: str) -> str:
    return name.partition(_BASE)[0]


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A module's tensors by their names in it, but for its bias, which is not merged."""
    kept = f"{prefix}base_layer.bias"
    return {
        name.removeprefix(prefix): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(prefix) and name != kept
    }


def _factors(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """A and B of a module."""
    names: tuple[tuple[str, str], ...] = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
    for names_of_kind in names:
        a, b = (getattr(module, name, {}) for name in names_of_kind)
        if ADAPTER in a and ADAPTER in b:
            return getattr(a[ADAPTER], "weight", a[ADAPTER]), getattr(b[ADAPTER], "weight", b[ADAPTER])
    return None


def _effective(module: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The merged weight of a module with an adapter.

    Args:
        tensors: by their names in the module.
        dtype: of the arithmetic and the result.
    """
    scale, weight = module.scaling[ADAPTER], tensors["base_layer.weight"].to(dtype)
    if (first := tensors.get(f"lora_embedding_A.{ADAPTER}")) is not None:
        change = tensors[f"lora_embedding_B.{ADAPTER}"].to(dtype) @ first.to(dtype)  # [H, V]
        return weight + scale * change.t()
    change = tensors[f"lora_B.{ADAPTER}.weight"].to(dtype) @ tensors[f"lora_A.{ADAPTER}.weight"].to(dtype)
    is_transposed = getattr(module, "fan_in_fan_out", False)  # of GPT-2's Conv1D
    weight = weight + scale * (change.t() if is_transposed else change)
    magnitude = tensors.get(f"lora_magnitude_vector.{ADAPTER}.weight")
    if magnitude is None:
        return weight
    inputs = 0 if is_transposed else 1
    # Without a gradient through the length, as in DoRA's section 4.3 and in peft.
    length = torch.linalg.vector_norm(weight.detach(), dim=inputs, keepdim=True)
    return weight * (magnitude.to(dtype).unsqueeze(inputs) / length)
