"""An optimizer and a course of its learning rate of the user's own, in the place of AdamW and the configured schedule.

The student is loaded, and on several ranks cut up, after the user has said what optimizes it. So he gives what makes an
optimizer, not an optimizer: a class, a class with keyword arguments, or a function.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import PreTrainedModel

from services.config import OptimizerConfig
from services.config.section import refuse_changed
from services.errors import ConfigError, UserCodeError
from trainer.optimizer import build_optimizer, build_schedule

OptimizerSource: TypeAlias = (
    type[Optimizer] | tuple[type[Optimizer], Mapping[str, Any]] | Callable[[PreTrainedModel], Optimizer] | None
)
"""What makes the optimizer: a class, which is given the parameters that train, maybe with keyword arguments (a pair, or
functools.partial); or a function, which is given the model. None: AdamW."""
ScheduleSource: TypeAlias = (
    type[LRScheduler] | tuple[type[LRScheduler], Mapping[str, Any]] | Callable[[Optimizer, int], LRScheduler] | None
)
"""What makes the schedule: a class, which is given the optimizer, maybe with keyword arguments; or a function, which is
given the optimizer and the number of steps. None: that of `config.optimizer`."""

_OF_OPTIMIZER = ["learning_rate", "weight_decay", "beta1", "beta2", "eps"]
_OF_SCHEDULE = ["schedule", "warmup_steps", "min_lr_ratio"]


@dataclass(frozen=True)
class OwnOptimizers:
    """What makes the optimizer and the schedule of a learner.

    >>> import torch
    >>> own = OwnOptimizers((torch.optim.SGD, {"lr": 0.1}))
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer, schedule = own.build(model, model, OptimizerConfig(), num_steps=10)
    >>> type(optimizer).__name__, schedule.get_last_lr()
    ('SGD', [0.1])
    """

    optimizer: OptimizerSource = None
    schedule: ScheduleSource = None

    def check(self, config: OptimizerConfig) -> None:
        """Find out before anything is loaded what cannot work.

        Raises:
            ConfigError: a ready object was given, or options of what is replaced.
        """
        for name, given, ready in (
            ("optimizers[0]", self.optimizer, Optimizer),
            ("optimizers[1]", self.schedule, LRScheduler),
        ):
            if isinstance(given, ready):
                raise ConfigError(
                    f"{name} is a ready {type(given).__name__}, which holds parameters of a model that is not the one trained here: "
                    "the student is loaded by the run. Give what makes one, e.g. (torch.optim.SGD, {'lr': 0.1}) or a function"
                )
            if given is not None and not callable(_split(given)[0]):
                raise ConfigError(
                    f"{name} is a {type(given).__name__}; give a class, a class with its arguments, or a function"
                )
        if inspect.isclass(found := _class_of(self.schedule)) and issubclass(found, ReduceLROnPlateau):
            raise ConfigError(
                "optimizers[1] = ReduceLROnPlateau needs a measurement at every step; give another schedule"
            )
        try:
            if self.optimizer is not None:
                refuse_changed(config, "optimizer", _OF_OPTIMIZER, "optimizers[0] makes the optimizer")
            if self.schedule is not None:
                refuse_changed(config, "optimizer", _OF_SCHEDULE, "optimizers[1] makes the schedule")
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def build(
        self, student: nn.Module, model: PreTrainedModel, config: OptimizerConfig, num_steps: int
    ) -> tuple[Optimizer, LRScheduler]:
        """Both, for a student that is where it trains.

        Raises:
            UserCodeError: one cannot be made, or would train something else.
        """
        if self.optimizer is None:
            optimizer: Optimizer = build_optimizer(student, config)
        else:
            optimizer = self._make_optimizer(student, model)
        if self.schedule is None:
            return optimizer, build_schedule(optimizer, config, num_steps)
        return optimizer, self._make_schedule(optimizer, num_steps)

    def _make_optimizer(self, student: nn.Module, model: PreTrainedModel) -> Optimizer:
        made: Any = _made("optimizers[0]", self.optimizer, Optimizer, [_trained(student)], [model])
        ours = {id(parameter) for parameter in _trained(student)}
        theirs = [parameter for group in made.param_groups for parameter in group["params"]]
        if strangers := sum(id(parameter) not in ours for parameter in theirs):
            raise UserCodeError(
                f"optimizers[0] made a {type(made).__name__} of {strangers} parameters that the student does not train; take them "
                "from the model that it is given"
            )
        step = inspect.signature(made.step).parameters.get("closure")
        if step is not None and step.default is inspect.Parameter.empty:
            raise UserCodeError(
                f"optimizers[0] made a {type(made).__name__}, whose step needs a closure; give another optimizer"
            )
        return made

    def _make_schedule(self, optimizer: Optimizer, num_steps: int) -> LRScheduler:
        made: Any = _made("optimizers[1]", self.schedule, LRScheduler, [optimizer], [optimizer, num_steps])
        if isinstance(made, ReduceLROnPlateau):
            raise UserCodeError("optimizers[1] made a ReduceLROnPlateau, which needs a measurement at every step")
        if made.optimizer is not optimizer:
            raise UserCodeError(
                f"optimizers[1] made a {type(made).__name__} of another optimizer than the one it is given"
            )
        return made


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _split(source: Any) -> tuple[Any, dict[str, Any]]:
    """What is called, and with which keyword arguments."""
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Mapping):
        return source[0], dict(source[1])
    return source, {}


def _class_of(source: Any) -> Any:
    """The class that makes it, where that is known."""
    call, _ = _split(source)
    return call.func if isinstance(call, functools.partial) else call


def _made(name: str, source: Any, kind: type, for_class: list[Any], for_function: list[Any]) -> Any:
    """What a source makes.

    Raises:
        UserCodeError: it failed, or made something else.
    """
    call, options = _split(source)
    arguments = for_class if inspect.isclass(_class_of(source)) else for_function
    try:
        made = call(*arguments, **options)
    except Exception as error:
        called = getattr(_class_of(source), "__name__", type(call).__name__)
        raise UserCodeError(
            f"{name} = {called} failed: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(made, kind):
        raise UserCodeError(f"{name} made a {type(made).__name__}; it must make a torch {kind.__name__}")
    return made


DEFAULT = OwnOptimizers()
"""AdamW and the configured schedule."""
