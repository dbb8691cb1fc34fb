"""What callbacks hear of a run, what they may ask for, and what becomes of a run when they fail."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from services.errors import ConfigError, PeerError, UserCodeError
from tests.unit.trainer.user_runs import Run
from trainer.callbacks.callback import EVENTS, Callback, RunControl, RunState
from trainer.callbacks.run_callbacks import checked_callbacks
from trainer.session import Session
from trainer.user_objects import UserObjects


class Watching(Callback):
    """Notes events with the state at each, and does what `acts` says at (event, step)."""

    def __init__(self, **acts: Any) -> None:
        self.heard: list[tuple[str, int]] = []
        self.states: list[RunState] = []
        self.acts = acts

    def __getattribute__(self, name: str) -> Any:
        if name not in EVENTS:
            return super().__getattribute__(name)

        def hear(state: RunState, control: RunControl) -> None:
            self.heard.append((name, state.step))
            self.states.append(state)
            if (act := self.acts.get(f"{name}_{state.step}")) is not None:
                act(state, control)

        return hear


def with_callbacks(*callbacks: Any) -> UserObjects:
    return UserObjects(callbacks=checked_callbacks(callbacks))


def steps_in(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "num_steps" in row]


def test_every_event_comes_in_its_place(run: Run) -> None:
    watching = Watching()
    run(with_callbacks(watching), output={"save_every_steps": 2}, evaluation={"every_steps": 2})
    step = [("on_push", 1), ("on_step_end", 1)]
    assert watching.heard == [
        *[("on_start", 0), ("on_push", 0), ("on_evaluate", 0)],
        *[("on_step_begin", 0), *step],
        *[("on_step_begin", 1), ("on_push", 2), ("on_step_end", 2), ("on_save", 2), ("on_evaluate", 2)],
        *[("on_step_begin", 2), ("on_push", 3), ("on_step_end", 3)],
        *[("on_save", 3), ("on_evaluate", 3), ("on_end", 3)],
    ]


def test_the_state_says_what_the_run_has_written(run: Run, tmp_path: Path) -> None:
    watching = Watching()
    summary = run(with_callbacks(watching))
    states = dict(zip(watching.heard, watching.states, strict=True))
    assert [states["on_push", n].policy_version for n in range(4)] == [0, 1, 2, 3]
    assert states["on_start", 0].policy_version is None and states["on_start", 0].num_steps == 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    (second,) = (row for row in rows if row["step"] == 2)
    assert states["on_step_end", 2].metrics == {name: value for name, value in second.items() if name != "step"}
    assert states["on_evaluate", 3].evaluation == summary.after
    last = states["on_end", 3]
    assert last.student_folder == tmp_path / "out" / "student" and last.error is None
    assert AutoModelForCausalLM.from_pretrained(last.student_folder).num_parameters() == last.model.num_parameters()


def test_a_callback_stops_the_run_in_order(run: Run, tmp_path: Path) -> None:
    watching = Watching(on_step_end_2=lambda state, control: control.stop())
    summary = run(with_callbacks(watching), pipeline={"steps": 5}, evaluation={"every_steps": 2})
    assert summary.steps == 2 and steps_in(tmp_path) == [1, 2]
    assert summary.after is not None and summary.after.policy_version == 2
    assert watching.heard[-3:] == [("on_save", 2), ("on_evaluate", 2), ("on_end", 2)]
    assert watching.heard.count(("on_evaluate", 2)) == 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 2


def test_a_run_that_is_stopped_before_its_first_step_saves_the_student_as_it_was(run: Run, tmp_path: Path) -> None:
    watching = Watching(on_start_0=lambda state, control: control.stop())
    assert run(with_callbacks(watching)).steps == 0
    assert (tmp_path / "out" / "student" / "config.json").exists()


def test_a_callback_saves_and_evaluates_when_it_likes(run: Run, tmp_path: Path) -> None:
    def ask(state: RunState, control: RunControl) -> None:
        control.save()
        control.evaluate()

    watching = Watching(on_step_end_1=ask)
    run(with_callbacks(watching))
    assert [folder.name for folder in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-1"]
    assert [step for event, step in watching.heard if event == "on_save"] == [1, 3]
    assert [step for event, step in watching.heard if event == "on_evaluate"] == [0, 1, 3]


def test_a_student_that_was_due_is_not_saved_once_more_at_the_next_step(run: Run, tmp_path: Path) -> None:
    watching = Watching(on_step_end_1=lambda state, control: control.save())
    run(with_callbacks(watching), output={"save_every_steps": 1, "save_total_limit": 5})
    assert [step for event, step in watching.heard if event == "on_save"] == [1, 2, 3, 3]


@pytest.mark.parametrize("event", ["on_push", "on_step_end"])
def test_a_callback_that_fails_ends_the_run_with_one_line_and_the_student_saved(
    event: str,
    run: Run,
    tmp_path: Path,
) -> None:
    def fail(state: RunState, control: RunControl) -> None:
        raise ValueError("no\nluck")

    watching, other = Watching(**{f"{event}_2": fail}), Watching()
    with pytest.raises(UserCodeError) as caught:
        run(with_callbacks(other, watching))
    assert str(caught.value) == f"the callback Watching failed in {event} after step 2: ValueError: no luck"
    assert isinstance(caught.value.__cause__, ValueError)
    assert steps_in(tmp_path) == [1, 2] and (tmp_path / "out" / "student" / "config.json").exists()
    assert not (tmp_path / "out" / "summary.json").exists()
    assert other.heard[-1] == ("on_end", 2) and other.states[-1].error is caught.value


def test_the_end_is_told_with_its_reason_and_what_fails_then_hides_nothing(run: Run) -> None:
    def fail(state: RunState, control: RunControl) -> None:
        raise ValueError("in the end")

    def break_pipeline(session: Session) -> None:
        async def broken() -> bytes:
            raise PeerError("no server")

        session.pipeline.next = broken  # type: ignore[method-assign]

    watching = Watching(on_end_0=fail)
    with pytest.raises(PeerError, match="no server"):
        run(with_callbacks(watching), break_pipeline)
    assert watching.heard[-1] == ("on_end", 0) and isinstance(watching.states[-1].error, PeerError)


def test_an_evaluation_without_held_out_prompts_is_refused_by_name(run: Run) -> None:
    watching = Watching(on_step_end_1=lambda state, control: control.evaluate())

    def without(session: Session) -> None:
        session.evaluator = None
        session.__post_init__()

    with pytest.raises(
        UserCodeError, match="Watching failed in on_step_end after step 1: an evaluation needs held-out"
    ):
        run(with_callbacks(watching), without)


@pytest.mark.parametrize(
    ("given", "message"),
    [(Watching, r"callbacks\[0\] = Watching is a class"), (print, r"callbacks\[0\] is a builtin"), (None, "NoneType")],
)
def test_what_is_no_callback_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_callbacks([given])


def test_a_state_cannot_be_changed(run: Run) -> None:
    watching = Watching()
    run(with_callbacks(watching), pipeline={"steps": 1})
    assert replace(watching.states[0], step=9).step == 9
    with pytest.raises(AttributeError):
        watching.states[0].step = 9  # type: ignore[misc]
