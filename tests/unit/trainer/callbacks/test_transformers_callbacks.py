"""transformers' own callbacks in a run of this project."""

from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback

from services.errors import ConfigError, UserCodeError
from tests.unit.trainer.user_runs import Run
from trainer.callbacks.run_callbacks import checked_callbacks
from trainer.callbacks.transformers_callbacks import _KNOWN
from trainer.session import Session
from trainer.user_objects import UserObjects


class Noting(TrainerCallback):
    """Notes events with (global_step, log_history's length), arguments and what comes with each."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []
        self.given: dict[tuple[str, int], dict[str, Any]] = {}
        self.arguments: Any = None

    def hear(self, event: str, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.arguments = args
        self.heard.append((event, state.global_step))
        self.given[self.heard[-1]] = given


for _name in _KNOWN:

    def _hear(self: Noting, args: Any, state: Any, control: Any, _event: str = _name, **given: Any) -> None:
        self.hear(_event, args, state, control, **given)

    setattr(Noting, _name, _hear)


def of(*callbacks: Any) -> UserObjects:
    return UserObjects(callbacks=checked_callbacks(callbacks))


def test_the_events_that_both_know_come_as_transformers_sends_them(run: Run) -> None:
    noting = Noting()
    run(of(noting), pipeline={"steps": 2}, output={"save_every_steps": 1})
    step = ["on_step_end", "on_log", "on_save"]
    assert noting.heard == [
        *[("on_init_end", 0), ("on_train_begin", 0), ("on_log", 0), ("on_evaluate", 0)],
        *[("on_step_begin", 0), *[(event, 1) for event in step]],
        *[("on_step_begin", 1), *[(event, 2) for event in step]],
        *[("on_save", 2), ("on_log", 2), ("on_evaluate", 2), ("on_train_end", 2)],
    ]


def test_what_comes_with_an_event_is_of_this_run(run: Run, tmp_path: Path) -> None:
    noting = Noting()
    summary = run(of(noting), pipeline={"steps": 2, "prompts_per_step": 3}, optimizer={"learning_rate": 0.02})
    metrics = noting.given["on_evaluate", 2]["metrics"]
    assert summary.after is not None and metrics["eval_reverse_kl"] == summary.after.reverse_kl
    assert {"model", "processing_class", "optimizer", "lr_scheduler"} <= set(noting.given["on_step_end", 1])
    args = noting.arguments
    found = (args.output_dir, args.max_steps, args.learning_rate, args.per_device_train_batch_size, args.logging_steps)
    assert found == (str(tmp_path / "out"), 2, 0.02, 3, 1)
    assert (args.lr_scheduler_type, args.adam_beta2, args.save_strategy) == ("cosine", 0.95, "no")


class Wanting(TrainerCallback):
    """Switches something on after the first step."""

    def __init__(self, **wanted: bool) -> None:
        self.wanted = wanted

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> Any:
        if state.global_step == 1:
            vars(control).update(self.wanted)
        return control


def test_what_is_switched_on_in_the_control_is_done(run: Run, tmp_path: Path) -> None:
    noting = Noting()
    run(of(Wanting(should_save=True, should_evaluate=True), noting))
    assert [step for event, step in noting.heard if event == "on_save"] == [1, 3]
    assert [step for event, step in noting.heard if event == "on_evaluate"] == [0, 1, 3]


def test_should_training_stop_ends_the_run_in_order(run: Run) -> None:
    assert run(of(Wanting(should_training_stop=True)), pipeline={"steps": 5}).steps == 1


def test_what_cannot_be_done_is_named(run: Run) -> None:
    with pytest.raises(UserCodeError, match="callback Wanting failed in on_step_end after step 1: should_epoch_stop"):
        run(of(Wanting(should_epoch_stop=True)))


def test_early_stopping_of_transformers_ends_a_run_that_does_not_improve(run: Run) -> None:
    """The student's reverse KL is made the same at every evaluation."""

    def constant(session: Session) -> None:
        assert session.evaluator is not None
        evaluation = None
        evaluate = session.evaluator.evaluate

        def once(learner: Any, policy_version: int) -> Any:
            nonlocal evaluation
            evaluation = evaluation or evaluate(learner, policy_version)
            return evaluation

        session.evaluator.evaluate = once  # type: ignore[method-assign]

    patience = EarlyStoppingCallback(early_stopping_patience=2)
    given = {"pipeline": {"steps": 9}, "evaluation": {"every_steps": 1}, "data": {"eval_path": "held-out.jsonl"}}
    assert run(of(patience), constant, **given).steps == 2


def test_a_printer_may_take_the_logs_apart(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(of(PrinterCallback()), pipeline={"steps": 1})
    assert "'grad_norm'" in capsys.readouterr().out


class ByPart(TrainerCallback):
    def on_substep_end(self, *_: Any, **__: Any) -> None: ...
    def on_optimizer_step(self, *_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    ("callback", "events"),
    [(ByPart(), "on_optimizer_step, on_substep_end"), (ProgressCallback(), "on_predict, on_prediction_step")],
)
def test_a_callback_of_events_that_do_not_happen_is_refused_by_name(callback: Any, events: str) -> None:
    with pytest.raises(ConfigError, match=f"{type(callback).__name__} overrides {events}, which does not happen here"):
        checked_callbacks([callback])
