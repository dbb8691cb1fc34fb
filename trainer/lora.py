"""The student's LoRA adapter: put into the model by peft, refused where it could not be pushed, and its folder on disk.

peft changes modules in place, so the model keeps its class, its names and its `save_pretrained`. The student's own weights are
frozen; what is trained is kept in float32, whatever the dtype of the weights beside it.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from services.config import LoraConfig
from services.errors import ConfigError, StartupError
from services.models.adapters import ADAPTER, adapted_modules, is_low_rank, plain_name, without_memory

logger = logging.getLogger(__name__)

# What peft writes before the names of a model's modules.
_PREFIX = "base_model.model."
# Of a saved adapter's configuration, what has to be as in the run's: the tensors' names and shapes say the rest.
_SAME = ("lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze a model and put an adapter beside its weights; or the saved one of `lora.adapter`.

    Raises:
        ConfigError: an option names modules that the model has not, or that cannot be adapted; or other options than those that
            the saved adapter was trained with.
        StartupError: there is no saved adapter in the folder.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings, Conv1D and experts, of which `_check_modules` knows
            if config.peft_kwargs:
                warnings.filterwarnings("error", "The following .* keys did not match", RuntimeWarning)
            inject_adapter_in_model(_peft_config(config), model, ADAPTER)
    except Exception as error:  # of peft, whose options these are
        also = f" and lora.peft_kwargs = {config.peft_kwargs!r}" if config.peft_kwargs else ""
        raise ConfigError(
            f"lora.target_modules = {config.target_modules!r}{also} are refused by peft: {_first_line(error)}"
        ) from error
    _check_modules(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.load_in_4bit:
        _save_as_unpacked(model)
    if config.adapter is not None:
        _go_on_from(model, config, Path(config.adapter))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    logger.info(
        "lora: %s of %s parameters are trained, in adapters of %d modules",
        *(f"{n:,}" for n in (trained, whole)),
        len(adapted_modules(model)),
    )


def _peft_config(config: LoraConfig) -> PeftLoraConfig:
    return PeftLoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        modules_to_save=config.modules_to_save or None,
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,
        task_type="CAUSAL_LM",
        **config.peft_kwargs,
    )


def _check_modules(model: PreTrainedModel, config: LoraConfig) -> None:
    """Whether everything that is trained has a name and a shape in a checkpoint, and the forward pass of the student sees it."""
    modules = dict(model.named_modules())
    for name in config.modules_to_save:
        if not any(f".{module}".endswith(f".{name}.modules_to_save") for module in modules):
            raise ConfigError(
                f"lora.modules_to_save names {name!r}, and no module of the student is called so; leave it out"
            )
    adapted = adapted_modules(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    ends = {name for name, module in modules.items() if module in (head, embedding)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    at_ends = sorted(end for end in ends if any(name.startswith(f"{end}.") for name in trained))
    if at_ends and model.config.get_text_config().tie_word_embeddings:
        raise ConfigError(
            f"lora: {at_ends[0]} is to be trained, but the student's output head is its embedding: one would change without the "
            "other; leave it out of lora.target_modules and lora.modules_to_save"
        )
    for name, module in adapted.items():
        if module is head and config.lora_dropout > 0:
            raise ConfigError(
                f"lora.lora_dropout = {config.lora_dropout} with an adapter on {name}: the head's product is computed from its "
                f"merged weight, which has no dropout; leave {name} out of lora.target_modules, or lora.lora_dropout"
            )
        if config.use_dora and isinstance(module.base_layer, nn.Embedding):
            raise ConfigError(
                f"lora.use_dora = True with an adapter on {name}, an embedding, is not supported; leave {name} out of "
                "lora.target_modules, or lora.use_dora"
            )
        if getattr(module.base_layer, "weight", torch.empty(0)).ndim != 2:
            raise ConfigError(
                f"lora.target_modules: {name} is a {type(module.base_layer).__name__}, whose adapter cannot be merged here; name "
                'linear layers or embeddings, of a mixture of experts those of its attention: ["q_proj", "k_proj", "v_proj", "o_proj"]'
            )
    for name, module in adapted.items():
        checkpoint_name(model, f"{name}.weight", without_memory(module.base_layer.weight).shape)
    for name in trained:
        if not is_low_rank(name):
            checkpoint_name(model, plain_name(name), model.get_parameter(name).shape)


def checkpoint_name(model: PreTrainedModel, name: str, shape: torch.Size) -> str:
    """Under which name a checkpoint holds a parameter of the model.

    Raises:
        ConfigError: in another shape, or in parts.
    """
    converted = revert_weight_conversion(model, {name: torch.empty(shape, device="meta")})
    (stored, tensor), *others = converted.items()
    if others or tensor.shape != shape:
        raise ConfigError(
            f"lora: {name} is trained in another form than a checkpoint stores it in ({stored}), so its adapter could not be "
            "named; leave it out of lora.target_modules and lora.modules_to_save"
        )
    return stored


# ------------------------------------------------------------------------------------------------------------- on disk


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an adapter's folder holds, by its names in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as peft's from_pretrained takes them.

    Args:
        tensors: whole, those of `trained_parameters`.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True)
    kept = get_peft_model_state_dict(model, dict(tensors), ADAPTER, save_embedding_layers=False)
    weights = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in kept.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(_config_of(model))
    base = Path(model.name_or_path)
    config.base_model_name_or_path = str(base.resolve()) if base.is_dir() else model.name_or_path
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _config_of(model: Any) -> PeftConfig:
    found: PeftConfig = model.peft_config[ADAPTER]
    return found


def _go_on_from(model: PreTrainedModel, config: LoraConfig, folder: Path) -> None:
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise StartupError(
            f"lora.adapter = {str(folder)!r} holds no saved adapter (adapter_config.json and adapter_model.safetensors); give the "
            "adapter folder of a student"
        )
    try:
        saved, stored = PeftLoraConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # of json, of safetensors, of peft
        raise StartupError(f"lora.adapter = {str(folder)!r} cannot be read: {_first_line(error)}") from error
    ours = _config_of(model)
    for name in _SAME:
        if getattr(saved, name, None) != getattr(ours, name):
            raise ConfigError(
                f"lora.adapter = {str(folder)!r} was trained with {name} = {getattr(saved, name, None)!r}, but this run has "
                f"{getattr(ours, name)!r}; give it as the adapter has it"
            )
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    expected = get_peft_model_state_dict(model, trained_parameters(model), ADAPTER, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    names = sorted(name for name in {*shapes, *theirs} if shapes.get(name) != theirs.get(name))
    if names:
        raise ConfigError(
            f"lora.adapter = {str(folder)!r} has other parts than lora.r = {config.r} and lora.target_modules come to: "
            f"{names[0]} is {theirs.get(names[0], 'missing')} there and {shapes.get(names[0], 'missing')} here; give the rank "
            "and the modules that it was trained with"
        )
    set_peft_model_state_dict(model, weights, ADAPTER)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------------------------------------- 4 bits


def four_bits(compute_dtype: torch.dtype) -> dict[str, Any]:
    """What from_pretrained takes for linear weights in four bits.

    Raises:
        StartupError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise StartupError(
            "lora.load_in_4bit = true needs the package bitsandbytes, which is not installed; `pip install bitsandbytes`, or "
            "leave lora.load_in_4bit out"
        )
    options: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute_dtype}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **options)}


def _save_as_unpacked(model: Any) -> None:
    """What is pushed and saved are merged weights in an ordinary dtype: the model's configuration must not say otherwise."""
    del model.config.quantization_config
    model.hf_quantizer = None
    for module in model.modules():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # bitsandbytes would pack them anew, in a form for itself alone
            module.support_avx512bf16_for_cpu = False
