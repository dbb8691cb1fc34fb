"""Functions as texts: how a process that is started afresh finds them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.errors import ConfigError


def reference_of(function: Callable[..., Any]) -> str:
    """What `reward.functions` calls a function: "module:function", or "file.py:function" for one of the script that runs.

    Raises:
        ConfigError: another process could not find it: it is a lambda, is defined inside another function, or its script is
            not a file.
    """
    name, module = getattr(function, "__qualname__", None), getattr(function, "__module__", None)
    shown = name or f"an object of {type(function).__name__}"
    if not callable(function):
        raise ConfigError(
            f"a reward function must be a function, got {shown}; write `def reward(completions, **kwargs)`"
        )
    if name is None or module is None:
        raise ConfigError(f"{shown} has no name by which another process finds it; call it in a function of a module")
    if "<lambda>" in name:
        raise ConfigError(
            "a lambda has no name by which another process finds it; write `def reward(completions, **kwargs)`"
        )
    if "<locals>" in name:
        outer = name.partition(".<locals>")[0]
        raise ConfigError(
            f"{name} is defined inside {outer}, where another process does not find it; move it to the top of its module"
        )
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found != function:
        raise ConfigError(
            f"{module}.{name} is another object than the function that was given; give the function under a name of its own, "
            "at the top of its module"
        )
    return f"{_of_script(name) if module == '__main__' else module}:{name}"


def _of_script(name: str) -> str:
    """How another process finds the module that runs as `__main__`."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:  # python -m
        return str(spec.name)
    if file is None or not Path(file).is_file() or Path(file).suffix != ".py":
        raise ConfigError(
            f"{name} is defined in a session that is no file of Python (a notebook, an interactive one), where another process "
            "does not find it; write it to a file and import it from there"
        )
    return str(Path(file).resolve())
