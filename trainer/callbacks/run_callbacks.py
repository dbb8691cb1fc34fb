"""The callbacks of one run: who is told of an event, and what a failure of theirs is called."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from services.errors import ConfigError, DistillServeError, UserCodeError
from trainer.callbacks.callback import Callback, RunControl, RunState
from trainer.callbacks.transformers_callbacks import TransformersCallback

logger = logging.getLogger(__name__)


def checked_callbacks(callbacks: Sequence[Callback | TrainerCallback]) -> list[Callback]:
    """Callbacks of both kinds as ours.

    Raises:
        ConfigError: one is of neither kind, or overrides an event that does not exist here.
    """
    found = []
    for place, callback in enumerate(callbacks):
        if isinstance(callback, type):
            raise ConfigError(
                f"callbacks[{place}] = {callback.__name__} is a class; give an object, {callback.__name__}()"
            )
        if isinstance(callback, TrainerCallback):
            callback = TransformersCallback(callback)
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks[{place}] is a {type(callback).__name__}; give a trainer.Callback or a transformers.TrainerCallback"
            )
        found.append(callback)
    return found


class RunCallbacks:
    """Tells callbacks, in their order.

    Attributes:
        state: of the run, at the last event.
        control: what was asked for.
    """

    def __init__(self, callbacks: Sequence[Callback], state: RunState, control: RunControl) -> None:
        self._callbacks, self.state, self.control = list(callbacks), state, control
        self._has_started = False

    def tell(self, event: str, **changes: Any) -> None:
        """Call `event` of every callback.

        Args:
            changes: of the state.

        Raises:
            UserCodeError: one of them failed.
        """
        self._has_started = True
        self.state = replace(self.state, **changes)
        for callback in self._callbacks:
            with _blaming(callback, event, self.state.step):
                getattr(callback, event)(self.state, self.control)

    @contextmanager
    def until_the_end(self) -> Iterator[None]:
        """However the block ends, callbacks that have heard of the run's start hear of its end.

        Raises:
            UserCodeError: one of them failed then; where the block failed as well, its own error.
        """
        try:
            yield
        except BaseException as error:
            if self._has_started:
                try:
                    self.tell("on_end", error=error)
                except UserCodeError as another:
                    logger.error("%s", another)
            raise
        self.tell("on_end")


@contextmanager
def _blaming(callback: Callback, event: str, step: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, DistillServeError) else f"{type(error).__name__}: {error}"
        name, event = _named(callback, event)
        raise UserCodeError(
            f"the callback {name} failed in {event} after step {step}: {' '.join(reason.split())}"
        ) from error


def _named(callback: Callback, event: str) -> tuple[str, str]:
    """What the user calls a callback, and the event in it."""
    if isinstance(callback, TransformersCallback):
        return type(callback.callback).__name__, callback.event or event
    return type(callback).__name__, event
