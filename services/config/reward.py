"""`[reward]`: rewards of whole completions besides the teacher's."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from services.config.section import Dtype, Section

# "module:function" or "folder/file.py:function"; a hub id has no colon.
_FUNCTION = re.compile(r"(?P<module>\w+(\.\w+)*|.*\.py):(?P<name>\w+(\.\w+)*)", re.DOTALL)


class RewardConfig(Section):
    """Rewards of whole completions besides the teacher's; docs/rewards.md says how to write one."""

    functions: list[str] = []
    """What gives rewards: "module:function", "file.py:function", or the folder or hub id of a sequence-classification model
    with one label; kinds may be mixed."""
    weights: list[float] | None = None
    """Weight of each of `functions` in a completion's reward, as many as those; default: 1 each."""
    advantage: Literal["group", "leave_one_out", "raw"] = "group"
    """What a reward is compared with: group: (R - mean) / (std + 1e-4) over the completions of its prompt; leave_one_out: R
    minus the mean of the others; raw: nothing."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest call, seconds: one function, the completions of one prompt; then its process is killed and the run ends."""
    startup_timeout_s: float = Field(300.0, gt=0)
    """How long a process may take to import the functions, or to load a model, seconds."""
    num_workers: int = Field(2, ge=1, le=256)
    """Processes that call functions, one call at a time each. All async functions share one more, in which their calls
    overlap, and each model has one of its own."""
    model_dtype: Dtype = "float32"
    """Dtype of the weights of reward models."""
    model_device: str = "cpu"
    """Where reward models run, e.g. "cuda:1"."""
    model_batch_size: int = Field(8, ge=1)
    """Texts that a reward model takes at once."""
    model_max_tokens: int | None = Field(None, ge=1)
    """Longer texts of a reward model lose their beginning; default: what the model has positions for."""
    trust_remote_code: bool = False
    """Run code that a reward model's repository brings along; off unless you have read that code."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for index, function in enumerate(self.functions):
            if not function.strip():
                raise ValueError(f"reward.functions[{index}] = {function!r} names nothing; leave it out")
            if function in self.functions[:index]:
                raise ValueError(
                    f"reward.functions names {function!r} twice; raise its weight in reward.weights instead"
                )
        if self.weights is not None and len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward.weights = {self.weights} has {len(self.weights)} weights for the {len(self.functions)} of "
                "reward.functions; give as many, or leave it out"
            )
        return self

    @property
    def function_weights(self) -> list[float]:
        """The weight of each function."""
        return self.weights if self.weights is not None else [1.0] * len(self.functions)

    @property
    def models(self) -> list[str]:
        """Those of `functions` that are models."""
        return [function for function in self.functions if split_function(function) is None]

    @property
    def names(self) -> list[str]:
        """What metrics call each of `functions`: its last part, where no other has the same."""
        short = [_short(function) for function in self.functions]
        return [one if short.count(one) == 1 else self.functions[index] for index, one in enumerate(short)]


def split_function(text: str) -> tuple[str, str] | None:
    """Module or file, and name of a function; None for a model's folder or hub id."""
    found = _FUNCTION.fullmatch(text)
    return None if found is None else (found["module"], found["name"])


def _short(function: str) -> str:
    found = split_function(function)
    return function.rstrip("/").rpartition("/")[2] if found is None else found[1]
