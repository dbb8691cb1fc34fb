"""A `transformers.TrainerCallback` as one of ours: the events that both know, and what it may read and ask for.

    ours             transformers'
    on_start         on_init_end, on_train_begin
    on_step_begin    on_step_begin
    on_step_end      on_step_end, on_log
    on_evaluate      on_evaluate, with "eval_reverse_kl" and the other measurements
    on_save          on_save
    on_end           on_train_end, where the run is complete

Not here: epochs (a step may span two), the parts of an optimizer step, the steps of a prediction. A callback that overrides
such an event is refused.
"""

import inspect
from dataclasses import asdict
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from services.config import RunConfig
from services.errors import ConfigError, EvaluationError
from trainer.callbacks.callback import Callback, RunControl, RunState

_KNOWN = (
    *("on_init_end", "on_train_begin", "on_step_begin", "on_step_end"),
    *("on_log", "on_evaluate", "on_save", "on_train_end"),
)
_BEST = "eval_reverse_kl"


class TransformersCallback(Callback):
    """Passes events on.

    Attributes:
        callback: the user's.
        event: of transformers, that it is being told, or was told last.

    Raises:
        ConfigError: it overrides an event that does not exist here; names it.
    """

    def __init__(self, callback: TrainerCallback) -> None:
        if unknown := [name for name in _overridden(callback) if name not in _KNOWN]:
            raise ConfigError(
                f"the callback {type(callback).__name__} overrides {', '.join(unknown)}, which does not happen here; the events "
                f"are {', '.join(_KNOWN)} (docs/python-api.md)"
            )
        self.callback, self.event = callback, ""
        self._control = TrainerControl()
        self._state = TrainerState()
        self._arguments: TrainingArguments | None = None

    def on_start(self, state: RunState, control: RunControl) -> None:
        self._arguments = training_arguments(state.config, state.num_steps)
        self._state = TrainerState(
            max_steps=state.num_steps,
            logging_steps=1,
            eval_steps=self._arguments.eval_steps,
            save_steps=self._arguments.save_steps,
            train_batch_size=self._arguments.train_batch_size,
            is_local_process_zero=True,
            is_world_process_zero=True,
        )
        self._tell("on_init_end", state, control)
        self._tell("on_train_begin", state, control)

    def on_step_begin(self, state: RunState, control: RunControl) -> None:
        self._tell("on_step_begin", state, control)

    def on_step_end(self, state: RunState, control: RunControl) -> None:
        self._tell("on_step_end", state, control)
        self._log(dict(state.metrics), state, control)

    def on_evaluate(self, state: RunState, control: RunControl) -> None:
        assert state.evaluation is not None
        metrics = {f"eval_{name}": value for name, value in asdict(state.evaluation).items() if value is not None}
        self._state.global_step = state.step
        self._log(metrics, state, control)
        self._tell("on_evaluate", state, control, metrics=metrics)
        if self._state.best_metric is None or metrics[_BEST] < self._state.best_metric:
            self._state.best_metric, self._state.best_global_step = metrics[_BEST], state.step

    def on_save(self, state: RunState, control: RunControl) -> None:
        self._tell("on_save", state, control)

    def on_end(self, state: RunState, control: RunControl) -> None:
        if state.error is None or isinstance(state.error, EvaluationError):
            self._tell("on_train_end", state, control)

    def _log(self, logs: dict[str, float], state: RunState, control: RunControl) -> None:
        self._state.log_history.append({**logs, "step": state.step})
        self._tell("on_log", state, control, logs=dict(logs))

    def _tell(self, event: str, state: RunState, control: RunControl, **more: Any) -> None:
        self.event, self._state.global_step = event, state.step
        epochs = state.config.pipeline.epochs
        # Without pipeline.epochs a run is not counted in them.
        self._state.epoch = None if epochs is None else epochs * state.step / state.num_steps
        given = {
            "model": state.model,
            "processing_class": state.tokenizer,
            "optimizer": state.optimizer,
            "lr_scheduler": state.schedule,
            "train_dataloader": None,
            "eval_dataloader": None,
            **more,
        }
        answer = getattr(self.callback, event)(self._arguments, self._state, self._control, **given)
        self._control = self._control if answer is None else answer
        self._ask(control)

    def _ask(self, control: RunControl) -> None:
        """Pass on what the callback has switched on."""
        if self._control.should_epoch_stop:
            raise ConfigError(
                "should_epoch_stop ends nothing here, a step may span two epochs; use should_training_stop"
            )
        if self._control.should_training_stop:
            control.stop()
        if self._control.should_save:
            control.save()
        if self._control.should_evaluate:
            control.evaluate()
        self._control._new_step()


def _overridden(callback: TrainerCallback) -> list[str]:
    events = [name for name, _ in inspect.getmembers(TrainerCallback, inspect.isfunction) if name.startswith("on_")]
    return [name for name in events if getattr(type(callback), name) is not getattr(TrainerCallback, name)]


def training_arguments(config: RunConfig, num_steps: int) -> TrainingArguments:
    """The options of a run as transformers calls them; what has no counterpart has transformers' default."""
    optimizer, pipeline, output, every = config.optimizer, config.pipeline, config.output, config.evaluation.every_steps
    return TrainingArguments(
        output_dir=output.dir,
        max_steps=num_steps,
        per_device_train_batch_size=pipeline.prompts_per_step * pipeline.samples_per_prompt,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=optimizer.schedule,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.max_grad_norm,
        logging_steps=1,
        eval_strategy="steps" if config.data.has_held_out_rows else "no",
        eval_steps=every or num_steps,
        save_strategy="steps" if output.save_every_steps else "no",
        save_steps=output.save_every_steps or num_steps,
        save_total_limit=output.save_total_limit,
        metric_for_best_model=_BEST,
        greater_is_better=False,
        seed=config.seed,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
