"""What a user's own code is told of a run, and what it may ask for.

    on_start ─► on_push(0) ─► on_evaluate(0) ─┬► on_step_begin ─► on_push ─► on_step_end ─► on_save ─► on_evaluate ─┐
                                              └──────────────────────── each step ◄──────────────────────────────┘
    ─► on_save ─► on_evaluate ─► on_end

`on_save` and `on_evaluate` come where a student is saved and measured. All of them are called in the main thread of rank 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.config import RunConfig
from services.errors import ConfigError
from trainer.evaluation.evaluate import Evaluation

EVENTS = ("on_start", "on_push", "on_step_begin", "on_step_end", "on_save", "on_evaluate", "on_end")


@dataclass(frozen=True)
class RunState:
    """A run as it is when an event comes.

    Attributes:
        step: the last one that is finished; 0 before the first.
        num_steps: that the run will have, unless a callback asks it to stop.
        policy_version: of the weights that the rollout servers hold; None before the first push.
        metrics: of the last step, as in metrics.jsonl.
        evaluation: the last one.
        student_folder: of the student that was saved last.
        error: why the run ends; None while it goes on, and where it is complete.
        model: that is trained. On several ranks each has a part of it: read it, do not change it.
        optimizer, schedule: that train it.
    """

    config: RunConfig
    num_steps: int
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step: int = 0
    policy_version: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    student_folder: Path | None = None
    error: BaseException | None = None


class RunControl:
    """What a callback may ask for; it is done when the events of the step are over.

    Args:
        can_evaluate: whether there are held-out prompts.
    """

    def __init__(self, *, can_evaluate: bool = True) -> None:
        self._can_evaluate = can_evaluate
        self._asked: set[str] = set()

    def stop(self) -> None:
        """End the run in order after this step: the student is saved, measured, and the summary written."""
        self._asked.add("stop")

    def save(self) -> None:
        """Put the student of this step into checkpoints/."""
        self._asked.add("save")

    def evaluate(self) -> None:
        """Measure the student of this step.

        Raises:
            ConfigError: there are no held-out prompts.
        """
        if not self._can_evaluate:
            raise ConfigError(
                "an evaluation needs held-out prompts; give eval_dataset, data.eval_path, data.eval_split or data.held_out"
            )
        self._asked.add("evaluate")

    @property
    def is_stopping(self) -> bool:
        return "stop" in self._asked

    def take(self, what: str) -> bool:
        """Whether "save" or "evaluate" was asked for since it was taken last."""
        is_asked = what in self._asked
        self._asked.discard(what)
        return is_asked


class Callback:
    """Override the events that you want to hear of.

    What a callback raises ends the run with one line that names it and the event; the student is saved before.

    >>> class StopWhenGood(Callback):
    ...     def on_evaluate(self, state: RunState, control: RunControl) -> None:
    ...         if state.evaluation is not None and state.evaluation.reverse_kl < 0.05:
    ...             control.stop()
    >>> sorted(name for name in vars(Callback) if name.startswith("on_"))
    ['on_end', 'on_evaluate', 'on_push', 'on_save', 'on_start', 'on_step_begin', 'on_step_end']
    """

    def on_start(self, state: RunState, control: RunControl) -> None:
        """The servers are attached and the student is loaded; nothing has been pushed."""

    def on_push(self, state: RunState, control: RunControl) -> None:
        """The rollout servers hold the weights of `state.policy_version`."""

    def on_step_begin(self, state: RunState, control: RunControl) -> None:
        """The next step's batch is about to be waited for; its prompts may be under way already."""

    def on_step_end(self, state: RunState, control: RunControl) -> None:
        """A step is trained, pushed and written down."""

    def on_evaluate(self, state: RunState, control: RunControl) -> None:
        """The student was measured: `state.evaluation`."""

    def on_save(self, state: RunState, control: RunControl) -> None:
        """A student is in `state.student_folder`, which later ones may replace."""

    def on_end(self, state: RunState, control: RunControl) -> None:
        """The run has ended, in order or with `state.error`; a student that was trained is saved. What is asked for now
        is not done any more."""
