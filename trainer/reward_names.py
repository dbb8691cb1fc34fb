"""Reward functions that are objects as the names by which their own processes import them."""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from services.errors import ConfigError
from trainer.model_folder import model_folder

RewardSource: TypeAlias = str | Path | PreTrainedModel | Callable[..., Any]
"""A name as reward.functions takes it, a function at the top level of a file, or a sequence-classification model."""


def reward_names(sources: Sequence[RewardSource], folder: Path) -> list[str]:
    """What reward.functions calls each of them.

    Args:
        folder: where models that are objects are saved.

    Raises:
        ConfigError: another process could not import it.
        StartupError, OutputError: of models.
    """
    return [_name(place, source, folder) for place, source in enumerate(sources)]


def _name(place: int, source: Any, folder: Path) -> str:
    option = f"reward_functions[{place}]"
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, PreTrainedModel):
        return model_folder(option, source, folder / f"reward-{place}", is_causal=False)
    if not inspect.isfunction(source):
        raise ConfigError(
            f"{option} is a {type(source).__name__}; give a function, 'module:function', or a sequence-classification model"
        )
    name, module = source.__qualname__, sys.modules.get(source.__module__)
    if not _is_found(module, name, source):
        raise ConfigError(
            f"{option} = {name} cannot be imported by the process that calls it; define it at the top level of a file, under its "
            "own name"
        )
    file = getattr(module, "__file__", None)
    if source.__module__ != "__main__" and ("." in source.__module__ or not str(file).endswith(".py")):
        return f"{source.__module__}:{name}"
    if file is None or not Path(file).is_file() or Path(file).suffix != ".py":
        raise ConfigError(
            f"{option} = {name} is defined in no file; put it into a module of its own and import it from there"
        )
    return f"{Path(file).resolve()}:{name}"


def _is_found(module: Any, name: str, function: Any) -> bool:
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is function
