"""What a Python program hands to a run besides its options: objects, which no run file can hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.config import RunConfig
from services.errors import ConfigError
from services.process.signals import Interruption
from trainer.callbacks.callback import Callback
from trainer.own_optimizers import OwnOptimizers
from trainer.rollout_function import RolloutFunction


@dataclass(frozen=True)
class UserObjects:
    """Of a run; a run from the command line has none.

    Attributes:
        optimizers: the one thing that ranks other than the first use; the same on all of them.
        rollout_timeout_s: how long one call of the rollout function may take.
        is_stream: data.path is the beginning of a stream, of which a longer run has more: it is used in its own order.
        watch: told of what another thread can end the run with.
        begun: told when the run has passed every check, and its files have replaced those of an earlier one.
    """

    callbacks: Sequence[Callback] = ()
    optimizers: OwnOptimizers = field(default_factory=OwnOptimizers)
    rollout_function: RolloutFunction | None = None
    rollout_timeout_s: float = 600.0
    is_stream: bool = False
    watch: Callable[[Interruption], None] = lambda interruption: None
    begun: Callable[[], None] = lambda: None

    def check(self, config: RunConfig) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: names both.
        """
        self.optimizers.check(config.optimizer)
        if self.rollout_function is None:
            return
        if not callable(self.rollout_function):
            raise ConfigError(f"rollout_function is a {type(self.rollout_function).__name__}; give a function")
        if not self.rollout_timeout_s > 0:
            raise ConfigError(f"rollout_timeout_s = {self.rollout_timeout_s} must be above 0, seconds")
        if config.loss.support == "student_topk":
            raise ConfigError(
                "rollout_function with loss.support = student_topk: the student's candidates come from the rollout servers, not "
                "from a function; set loss.support = teacher_topk"
            )


NOTHING = UserObjects()
"""Of a run from the command line."""
