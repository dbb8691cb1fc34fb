"""In a worker: functions of the user, how they are imported and called, and what of their answers is a reward."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# Beyond this, sums and differences of rewards are no numbers any more.
_LARGEST = 1e30
_LONGEST_TEXT = 300


class NotARewardError(Exception):
    """What a function returned is no list of rewards.

    Attributes:
        sample: of which completion, if it is one's.
    """

    def __init__(self, message: str, sample: int | None = None) -> None:
        super().__init__(message)
        self.sample = sample


@dataclass(frozen=True)
class TrainerState:
    """`trainer_state` of a reward function: where the run is. `global_step` and `max_steps` are transformers' names."""

    step: int
    num_steps: int

    @property
    def global_step(self) -> int:
        return self.step

    @property
    def max_steps(self) -> int:
        return self.num_steps


@dataclass(frozen=True)
class RewardFunction:
    """A function of the user.

    Attributes:
        parameters: keyword arguments that it takes; None: all that there are.
        required: those of them without a default.
    """

    function: Callable[..., Any]
    is_async: bool
    parameters: list[str] | None
    required: list[str]

    @classmethod
    def load(cls, module: str, name: str) -> "RewardFunction":
        """Import it.

        Raises:
            BaseException: whatever its module raises.
            TypeError: it is no function, or one that cannot be called with keyword arguments.
        """
        found: Any = _load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if not callable(found):
            raise TypeError(f"{name} is no function but of type {type(found).__name__}")
        is_async = inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(type(found).__call__)
        return cls(found, is_async, *_parameters(found))

    def call(self, arguments: dict[str, Any]) -> Any:
        """What it returns: rewards, or what has to be awaited for them."""
        names = arguments.keys() if self.parameters is None else self.parameters
        return self.function(**{name: arguments[name] for name in names if name in arguments})

    def explain(self, error: BaseException) -> str:
        """An error in one line, with the place in the function's file where it arose."""
        if isinstance(error, SystemExit):
            said = f"called sys.exit({error.code if error.code is not None else ''})"
        else:
            said = f"raised {describe(error)}"
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
        if not own:
            return said
        return f"{said} ({Path(own[-1].filename).name}, line {own[-1].lineno})"


def _load_file(path: Path) -> ModuleType:
    """The module of a file, which may be a script: its `if __name__ == "__main__":` is not run."""
    name = f"reward_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))  # what lies beside a script can be imported by it
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _parameters(function: Callable[..., Any]) -> tuple[list[str] | None, list[str]]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # written in C
        return None, []
    required = []
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"it takes `{parameter.name}` by its place alone, and is called with keyword arguments")
        if parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            required.append(parameter.name)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None, required
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters if parameter.kind in by_name], required


async def awaited(returned: Awaitable[Any]) -> Any:
    """The result of what a function has returned, as a coroutine."""
    return await returned


def checked_rewards(returned: Any, count: int) -> list[float | None]:
    """A list of `count` numbers or None: what a function has returned, which may be an array or a tensor.

    Raises:
        NotARewardError: it is something else, too long or too short, or a number is not finite.
    """
    values = returned.tolist() if callable(getattr(returned, "tolist", None)) else returned
    if not isinstance(values, list | tuple):
        raise NotARewardError(f"returned {describe_value(returned)}, which is no list of rewards")
    if len(values) != count:
        raise NotARewardError(f"returned {len(values)} rewards")
    return [_checked(value, index) for index, value in enumerate(values)]


def _checked(value: Any, index: int) -> float | None:
    if value is None:
        return None
    number = value.item() if callable(getattr(value, "item", None)) else value
    if not isinstance(number, bool | int | float):
        raise NotARewardError(f"gave {describe_value(value)}", index)
    if not -_LARGEST <= number <= _LARGEST:  # which NaN is not either
        raise NotARewardError(f"gave {describe_value(number)}", index)
    return float(number)


def describe_value(value: Any) -> str:
    """A value and its type, short and in one line."""
    try:
        shown = repr(value)
    except Exception:
        shown = "a value"
    return f"{_shortened(shown)} ({type(value).__name__})"


def describe(error: BaseException) -> str:
    """Type and message of an error, short and in one line."""
    try:
        said = str(error)
    except Exception:
        said = ""
    return _shortened(f"{type(error).__name__}: {said}" if said else type(error).__name__)


def _shortened(text: str) -> str:
    line = " ".join(text.split()).encode(errors="backslashreplace").decode()
    return line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 3] + "..."
