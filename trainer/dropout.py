"""No noise in the student's training mode: every probability of dropping something becomes zero, and that is proven.

Architectures keep these probabilities in layers (nn.Dropout), in numbers beside them (OPT's `dropout` and `layerdrop`,
BLOOM's `hidden_dropout`, Mixtral's `jitter_noise`), and in the configuration, which some read at every call.
"""

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from services.errors import StartupError

# How the name of a number says that it is a probability of dropping something, or the size of a noise.
_NAMES_OF_NOISE = ("drop", "jitter")
_PROBE_FORWARDS = 3


def disable_dropout(model: PreTrainedModel) -> None:
    """Zero wherever a probability is kept, but for the configuration that is saved with the model.

    Raises:
        StartupError: in training mode the model still is not a function of its input.
    """
    muted: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            is_layer = name == "p" and "drop" in type(module).__name__.lower()
            if (is_layer or _is_noise(name)) and isinstance(value, float):
                setattr(module, name, 0.0)
        config = vars(module).get("config")
        # The model's own is what `save_pretrained` writes; its parts get a copy, which is what layers read.
        if isinstance(config, PreTrainedConfig) and module is not model:
            module.config = muted.setdefault(id(config), _muted(config))
    _check_is_a_function(model)


def _is_noise(name: str) -> bool:
    return any(part in name for part in _NAMES_OF_NOISE)


def _muted(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without noise, in parts of it neither."""
    found = copy.deepcopy(config)
    parts: list[Any] = [found]
    while parts:
        values = vars(parts.pop())
        for name, value in values.items():
            if _is_noise(name) and isinstance(value, float):
                values[name] = 0.0
            elif isinstance(value, PreTrainedConfig):
                parts.append(value)
    return found


@torch.no_grad()
def _check_is_a_function(model: PreTrainedModel) -> None:
    was_training = model.training
    ids = torch.arange(1, 9, device=model.device).unsqueeze(0) % model.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng():
        model.train()
        first, *others = (model(input_ids=ids, use_cache=False).logits.float() for _ in range(_PROBE_FORWARDS))
        model.train(was_training)
    furthest = max((other - first).abs().max().item() for other in others)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.03
    if not furthest <= tolerance * max(first.abs().max().item(), 1.0):
        raise StartupError(
            f"student.disable_dropout = true, but in training mode {type(model).__name__} answers the same input with logits that "
            f"differ by {furthest:.2g}: it has a noise that this project does not know; set student.disable_dropout = false "
            "to train with it"
        )
