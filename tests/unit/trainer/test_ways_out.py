"""Every way out of a run after its first step leaves the student of the last finished step on disk (and none before it).

The expected students come from a run that nothing disturbs: what a run has learned after a step depends on nothing later.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.clients.teacher_probe import probe_sequences
from services.errors import (
    ChangedTeacherError,
    DistillServeError,
    EvaluationError,
    OutageError,
    OutputError,
    PeerError,
    WeightSyncError,
)
from services.process.signals import Interrupted
from services.wire.rollout import VersionSpan
from services.wire.teacher import TeacherScores
from tests.scripted_teacher import ScriptedTeacher
from tests.unit.trainer.runs import PROMPTS, opener, pushes_of, rollouts_of, run_config, weights_of
from trainer import train as training
from trainer.output import report
from trainer.session import Session
from trainer.train import train

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    with ScriptedTeacher().serving() as serving:
        yield serving


@dataclass
class Run:
    """One run, disturbed by `disturb`."""

    folder: str
    output: Path
    teacher: ScriptedTeacher
    monkeypatch: pytest.MonkeyPatch

    def go(self, disturb: Callable[[Session], None] = lambda session: None, **sections: dict[str, Any]) -> Any:
        config = run_config(self.folder, self.output, **sections)
        self.monkeypatch.setattr(training, "open_session", opener(self.teacher, disturb))
        return train(config)

    def student(self) -> dict[str, torch.Tensor]:
        return weights_of(AutoModelForCausalLM.from_pretrained(self.output / "student"))


@pytest.fixture
def run(tiny_model_folder: Any, tmp_path: Path, teacher: ScriptedTeacher, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tiny_model_folder("llama"), tmp_path / "out", teacher, monkeypatch)


def undisturbed(run: Run, **sections: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """The weights after 0, 1, 2 and 3 steps."""
    seen: list[dict[str, torch.Tensor]] = []

    def watch(session: Session) -> None:
        seen.append(weights_of(session.learner.student.model))
        pushes_of(session).on_push = lambda version: (
            seen.append(weights_of(session.learner.student.model)) if version else None
        )

    Run(run.folder, run.output.with_name("undisturbed"), run.teacher, run.monkeypatch).go(watch, **sections)
    return seen


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def at(number: int, act: Callable[[], Any]) -> Callable[[int], None]:
    """Call `act` when the counter has come to `number`."""
    return lambda count: act() if count == number else None


def from_on(number: int, act: Callable[[], Any]) -> Callable[[int], None]:
    """Call `act` whenever the counter is at `number` or beyond."""
    return lambda count: act() if count >= number else None


def signalled(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


# Calls of generate: 1 is the evaluation before, then one a step, then the evaluation after.
def rollouts_fail(session: Session, run: Run) -> None:
    rollouts_of(session).on_call = at(4, raising(PeerError("gone")))


def teacher_fails(session: Session, run: Run) -> None:
    rollouts_of(session).on_call = at(4, lambda: setattr(run.teacher, "refuse", lambda body: (500, {})))


def teacher_changes(session: Session, run: Run) -> None:
    """After step 2 its weights are gone: it answers, and every token is equally likely."""

    def uniform(scores: TeacherScores) -> TeacherScores:
        columns = {name: np.full_like(getattr(scores, name), -5.5) for name in ("token_logprobs", "topk_logprobs")}
        return replace(scores, **columns)

    (teacher,) = session.pipeline._scoring._teachers
    session.event_loop.run(teacher.client.keep_probe, probe_sequences([prompt.token_ids for prompt in PROMPTS]))
    rollouts_of(session).on_call = at(4, lambda: setattr(run.teacher, "spoil", uniform))


def rows_are_bad(session: Session, run: Run) -> None:
    def spoil() -> None:
        run.teacher.spoil = lambda scores: replace(scores, token_logprobs=np.full_like(scores.token_logprobs, np.nan))

    rollouts_of(session).on_call = at(4, spoil)


def push_fails(session: Session, run: Run) -> None:
    pushes_of(session).on_push = at(2, raising(WeightSyncError("torn")))


def a_bug(session: Session, run: Run) -> None:
    rollouts_of(session).on_call = from_on(4, raising(RuntimeError("a bug")))


def gradient_is_not_finite(session: Session, run: Run, update: int = 3) -> None:
    clip, calls = torch.nn.utils.clip_grad_norm_, iter(range(1, 100))

    def clip_grad_norm(parameters: Any, most: float) -> Any:
        norm = clip(parameters, most)
        return torch.tensor(float("nan")) if next(calls) == update else norm

    run.monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm)


def disk_is_full(session: Session, run: Run) -> None:
    append, calls = report.append_line, iter(range(1, 100))

    def append_line(path: Path, line: bytes) -> None:
        if path.name == "metrics.jsonl" and next(calls) == 3:  # of the evaluation before, steps 1 and 2
            raise OutputError(f"{path} cannot be written: No space left on device")
        append(path, line)

    run.monkeypatch.setattr(report, "append_line", append_line)


def ended_in_rollouts(session: Session, run: Run) -> None:
    rollouts_of(session).on_call = at(4, signalled)


def ended_in_a_push(session: Session, run: Run) -> None:
    pushes_of(session).on_push = at(2, partial(signalled, signal.SIGINT))


def ended_in_a_forward_pass(session: Session, run: Run) -> None:
    forward, learner = session.learner._forward, session.learner

    def signalled_forward(*arguments: Any, **options: Any) -> Any:
        if learner.finished_step == 2 and torch.is_grad_enabled():
            signalled(signal.SIGHUP)
        return forward(*arguments, **options)

    learner._forward = signalled_forward  # type: ignore[method-assign]


def ended_in_the_update(session: Session, run: Run) -> None:
    step, calls = session.learner.optimizer.step, iter(range(1, 100))

    def signalled_step() -> None:
        if next(calls) == 2:
            signalled()
        step()

    session.learner.optimizer.step = signalled_step  # type: ignore[method-assign, assignment]


def ended_twice_in_the_update(session: Session, run: Run) -> None:
    """By somebody who does not wait: a student in the middle of an update is none of any step."""
    step, calls = session.learner.optimizer.step, iter(range(1, 100))

    def signalled_step() -> None:
        if next(calls) == 2:
            signalled()
            signalled(signal.SIGINT)
        step()

    session.learner.optimizer.step = signalled_step  # type: ignore[method-assign, assignment]


def ended_twice_between_two_updates(session: Session, run: Run) -> None:
    """The weights of the step before are put back, which is not given up half-way."""
    step, calls = session.learner.optimizer.step, iter(range(1, 100))

    def signalled_step() -> None:
        step()
        if next(calls) == 5:  # the first of two of the third step
            signalled(signal.SIGINT)

    copy_, copies = torch.Tensor.copy_, iter(range(1, 1000))

    def signalled_copy(self: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if session.learner.finished_step == 2 and isinstance(self, torch.nn.Parameter) and next(copies) == 2:
            signalled(signal.SIGINT)
        return copy_(self, *arguments)

    session.learner.optimizer.step = signalled_step  # type: ignore[method-assign, assignment]
    run.monkeypatch.setattr(torch.Tensor, "copy_", signalled_copy)


WAYS: list[tuple[Callable[..., None], type[BaseException], int]] = [
    (rollouts_fail, PeerError, 2),
    (teacher_fails, OutageError, 2),
    (teacher_changes, ChangedTeacherError, 2),
    (rows_are_bad, PeerError, 2),
    (push_fails, WeightSyncError, 2),
    (a_bug, RuntimeError, 2),
    (gradient_is_not_finite, DistillServeError, 2),
    (disk_is_full, OutputError, 2),
    (ended_in_rollouts, Interrupted, 2),
    (ended_in_a_push, Interrupted, 2),
    (ended_in_a_forward_pass, Interrupted, 2),
    (ended_in_the_update, Interrupted, 2),  # which is finished
    (ended_twice_in_the_update, Interrupted, 2),
]


@pytest.mark.parametrize(("disturb", "error", "last"), WAYS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_student_of_the_last_finished_step_is_kept(
    disturb: Callable[..., None], error: type[BaseException], last: int, run: Run
) -> None:
    expected = undisturbed(run)
    with pytest.raises(error):
        run.go(partial(disturb, run=run))
    assert_same(run.student(), expected[last])
    assert not torch.equal(expected[last]["lm_head.weight"], expected[last - 1]["lm_head.weight"])
    assert not (run.output / "summary.json").exists()
    left = {path.name for path in run.output.iterdir()}
    assert left <= {"student", "config.json", "metrics.jsonl", "samples.jsonl", "quarantine.jsonl", "journal.jsonl"}
    for line in (run.output / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_run_that_ends_before_its_first_step_leaves_no_student(run: Run) -> None:
    with pytest.raises(PeerError):
        run.go(lambda s: setattr(rollouts_of(s), "on_call", at(2, raising(PeerError("gone")))))
    assert not (run.output / "student").exists() and not (run.output / ".reserve").exists()


def test_a_step_of_several_updates_is_finished_or_has_not_been(run: Run) -> None:
    pipeline = {"updates_per_batch": 2}
    expected = undisturbed(run, pipeline=pipeline)
    with pytest.raises(DistillServeError, match="gradient norm is nan"):
        run.go(partial(gradient_is_not_finite, run=run, update=6), pipeline=pipeline)  # the second one of step 3
    assert_same(run.student(), expected[2])


def test_weights_that_are_put_back_are_put_back_whole(run: Run) -> None:
    pipeline = {"updates_per_batch": 2}
    expected = undisturbed(run, pipeline=pipeline)
    with pytest.raises(Interrupted):
        run.go(partial(ended_twice_between_two_updates, run=run), pipeline=pipeline)
    run.monkeypatch.undo()
    assert_same(run.student(), expected[2])


def test_a_step_whose_push_fails_is_in_the_metrics(run: Run) -> None:
    with pytest.raises(WeightSyncError):
        run.go(partial(push_fails, run=run))
    rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "push_s" in row) for row in rows if "train_s" in row] == [(1, True), (2, False)]


@pytest.mark.parametrize("patient", [True, False])
def test_who_ends_a_run_is_told_of_the_saving_and_a_second_ctrl_c_gives_it_up(
    patient: bool, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    def disturb(session: Session) -> None:
        rollouts_of(session).on_call = at(4, partial(signalled, signal.SIGINT))
        save = session.students.save

        def slow(step: int) -> None:
            if not patient:
                signalled(signal.SIGINT)
            save(step)

        session.students.save = slow  # type: ignore[method-assign]

    with caplog.at_level("INFO"), pytest.raises(Interrupted, match="ended by SIGINT"):
        run.go(disturb)
    said = [record.getMessage() for record in caplog.records]
    assert "ended by SIGINT: saving the student of step 2, which a second Ctrl-C gives up" in said
    assert ("the student of step 2 is lost: ended by SIGINT" in said) is not patient
    assert (run.output / "student").exists() is patient


def test_a_step_that_is_skipped_costs_itself_alone(run: Run) -> None:
    optimizer = {"max_skipped_updates": 1, "learning_rate": 1e-2}
    run.go(partial(gradient_is_not_finite, run=run, update=2), optimizer=optimizer)
    rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["num_skipped_updates"], "loss" in row) for row in rows if "train_s" in row]
    assert steps == [(1, 0.0, True), (2, 1.0, False), (3, 0.0, True)]


def failing_evaluations(*steps: int) -> Callable[[Session], None]:
    def disturb(session: Session) -> None:
        assert session.evaluator is not None
        evaluate = session.evaluator.evaluate

        def evaluate_or_fail(learner: Any, policy_version: int) -> Any:
            if policy_version in steps:
                raise PeerError("the teacher answered 422: a row it does not take")
            return evaluate(learner, policy_version)

        session.evaluator.evaluate = evaluate_or_fail  # type: ignore[method-assign]

    return disturb


@pytest.mark.parametrize("failing", [(3,), (1,), (0,), (0, 1, 2, 3)], ids=str)
def test_a_failing_evaluation_costs_a_measurement_alone(
    failing: tuple[int, ...], run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    expected = undisturbed(run)
    with pytest.raises(EvaluationError, match=r"student saved in .*student.* a row it does not take") as raised:
        run.go(failing_evaluations(*failing), evaluation={"every_steps": 1})
    assert raised.value.exit_code not in (0, 1)
    assert_same(run.student(), expected[3])
    summary = json.loads((run.output / "summary.json").read_text())
    reason = "the teacher answered 422: a row it does not take"
    assert summary["failed_evaluations"] == [{"step": step, "reason": reason} for step in failing]
    assert [summary["before"] is None, summary["after"] is None] == [0 in failing, 3 in failing]
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert sum(reason in text for text in warnings) == len(failing)


def restarted_in_evaluations(*calls: int) -> Callable[[Session], None]:
    """The rollout servers are started again just before these calls of generate: they answer under no version of the run."""

    def disturb(session: Session) -> None:
        rollouts = rollouts_of(session)
        rollouts.on_call = lambda call: setattr(rollouts, "version", "default") if call in calls else None
        complete = rollouts._complete

        def initial_weights(index: int, most: int) -> Any:
            if rollouts.version != "default":
                return complete(index, most)
            rollouts.version = "0.1@run"
            answered = complete(index, most)
            rollouts.version = "default"
            return replace(answered, policy_versions=[VersionSpan("default", 0, len(answered.token_ids))])

        rollouts._complete = initial_weights  # type: ignore[method-assign]

    return disturb


# Calls of generate: 1 is the evaluation before, 2 to 4 the steps, 5 the evaluation after.
@pytest.mark.parametrize(("calls", "num_again"), [((1,), 1), ((5,), 1), ((5, 6), 2), ((1, 6), 2)], ids=str)
def test_an_evaluation_during_which_a_rollout_server_restarts_is_made_again_under_the_right_weights(
    calls: tuple[int, ...], num_again: int, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    expected = Run(run.folder, run.output.with_name("undisturbed"), run.teacher, run.monkeypatch).go()
    summary = run.go(restarted_in_evaluations(*calls))
    for name in ("before", "after"):
        assert getattr(summary, name) == getattr(expected, name) is not None
    assert (summary.before.policy_version, summary.after.policy_version) == (0, 3)
    warnings = [r.getMessage() for r in caplog.records if "is made again" in r.getMessage()]
    assert len(warnings) == num_again and "under the version 'default'" in warnings[0]


def test_an_evaluation_that_is_always_answered_under_initial_weights_is_dropped(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(EvaluationError, match="under the version 'default'"):
        run.go(restarted_in_evaluations(5, 6, 7))
    summary = json.loads((run.output / "summary.json").read_text())
    assert summary["after"] is None and [f["step"] for f in summary["failed_evaluations"]] == [3]
    assert (run.output / "student" / "model.safetensors").exists()


def test_an_evaluation_that_fails_by_a_bug_is_no_different(run: Run) -> None:
    def disturb(session: Session) -> None:
        rollouts_of(session).on_call = at(5, raising(ZeroDivisionError("a bug")))

    with pytest.raises(EvaluationError, match="ZeroDivisionError: a bug"):
        run.go(disturb)
    assert (run.output / "student" / "model.safetensors").exists()


def test_the_student_is_on_disk_before_the_last_evaluation(run: Run) -> None:
    expected = undisturbed(run)
    seen: list[dict[str, torch.Tensor]] = []
    with pytest.raises(Interrupted):
        run.go(
            lambda s: setattr(
                rollouts_of(s), "on_call", at(5, lambda: (seen.append(run.student()), signalled(signal.SIGINT)))
            )
        )
    assert_same(seen[0], expected[3])
    assert not (run.output / "summary.json").exists()


def test_the_last_few_students_are_kept_while_the_run_goes(run: Run) -> None:
    output = {"save_every_steps": 1, "save_total_limit": 2}
    expected = undisturbed(run)
    run.go(output=output)
    folders = sorted((run.output / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-2", "step-3"]
    for folder, weights in zip(folders, expected[2:], strict=True):
        assert_same(weights_of(AutoModelForCausalLM.from_pretrained(folder)), weights)


def test_an_earlier_student_is_there_until_there_is_a_newer_one(run: Run) -> None:
    run.go(output={"save_every_steps": 2})
    earlier = run.student()
    again = {"overwrite": True, "save_every_steps": 2}
    with pytest.raises(PeerError):
        run.go(lambda s: setattr(rollouts_of(s), "on_call", at(2, raising(PeerError("gone")))), output=again)
    assert_same(run.student(), earlier)
    assert (run.output / "checkpoints" / "step-2").exists()

    seen: list[dict[str, torch.Tensor]] = []

    def look(version: int) -> None:
        if version == 1:  # killed from here on, what the earlier run left must not pass for this one's
            seen.append(run.student())
            assert not (run.output / "checkpoints").exists()

    expected = undisturbed(run)
    run.go(lambda s: setattr(pushes_of(s), "on_push", look), output=again)
    assert_same(seen[0], expected[1])


def test_a_run_in_a_thread_of_a_program_has_no_signals_and_works(run: Run) -> None:
    expected = undisturbed(run)
    thread = threading.Thread(target=run.go)
    thread.start()
    thread.join()
    assert_same(run.student(), expected[3])
