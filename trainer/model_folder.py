"""A model as the servers take it: an id or a folder, into which an object is saved first."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.errors import ConfigError, StartupError
from services.models.causal_lm import chat_template_hash, load_tokenizer, tokenizer_fingerprint
from services.process.files import cannot_write, sync_folder


def model_folder(
    name: str,
    model: str | Path | PreTrainedModel,
    into: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    trust_remote_code: bool = False,
    is_causal: bool = True,
) -> str:
    """The id or folder of a model.

    Args:
        name: of the argument, "student" or "teacher", for errors.
        into: where an object is saved, in its dtype, with its tokenizer; what is there is replaced.
        tokenizer: of an object; default: the one of the folder or id that it was loaded from. With an id or a folder it must
            be the one that is there.
        is_causal: whether it must be a causal LM.

    Raises:
        ConfigError: it is no causal LM that can be saved, or the tokenizer is another one.
        StartupError: there is no tokenizer.
        OutputError: it cannot be written.
    """
    if isinstance(model, str | Path):
        if tokenizer is not None:
            _check_same_tokenizer(name, str(model), tokenizer, trust_remote_code)
        return str(model)
    _check_can_be_saved(name, model, is_causal)
    tokenizer = tokenizer or _own_tokenizer(name, model, trust_remote_code)
    beside = into.with_name(f".{into.name}.part")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        sync_folder(beside)
        shutil.rmtree(into, ignore_errors=True)
        beside.replace(into)
    except OSError as error:
        raise cannot_write(into, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return str(into)


def _check_can_be_saved(name: str, model: Any, is_causal: bool) -> None:
    """Refuse objects whose weights are not a plain checkpoint."""
    kind = type(model).__name__
    if isinstance(model, type):
        raise ConfigError(f"{name} is the class {model.__name__}; give an object, an id or a folder")
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(f"{name} is a {kind} with an adapter; give the merged model, `model.merge_and_unload()`")
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"{name} is a {kind}; give a transformers.PreTrainedModel, an id or a folder")
    if is_causal and not model.can_generate():
        raise ConfigError(f"{name} is a {kind}, which has no language model head; load it with AutoModelForCausalLM")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(f"{name} is a quantized {kind}; give the model in float32 or half precision, or its id")
    for key, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(f"{name} has no weights: {key} is on the meta device; load them, or give the model's id")
        if hasattr(parameter, "full_tensor"):
            raise ConfigError(f"{name} is cut up over several ranks ({key} is a DTensor); give its id or folder")


def _own_tokenizer(name: str, model: PreTrainedModel, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    path = getattr(model, "name_or_path", "")
    if not path:
        raise ConfigError(f"{name} is an object that was loaded from nowhere; give its tokenizer as processing_class")
    try:
        return load_tokenizer(path, trust_remote_code=trust_remote_code, key=name)
    except StartupError as error:
        raise StartupError(f"{error}; give the tokenizer as processing_class") from error


def _check_same_tokenizer(name: str, model: str, tokenizer: Any, trust_remote_code: bool) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"processing_class is a {type(tokenizer).__name__}; give a tokenizer of transformers")
    there = load_tokenizer(model, trust_remote_code=trust_remote_code, key=name)
    ours, theirs = ((tokenizer_fingerprint(t), chat_template_hash(t)) for t in (tokenizer, there))
    if ours != theirs:
        raise ConfigError(
            f"processing_class is not the tokenizer of {name} = {model!r}, which the servers load; save both into one folder "
            "and give that"
        )
