"""A run that ends and goes on is, bit for bit, the run that nobody disturbed; and it refuses to go on as another one."""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.config.output_dir import RESUME, complete_checkpoints
from services.errors import (
    ConfigError,
    OutageError,
    OutputError,
    PeerError,
    RankLostError,
    RequestError,
    StartupError,
    WeightSyncError,
)
from services.process.signals import Interrupted
from services.rollout.holder import Holder
from tests.unit.trainer.checkpoint.learners import assert_same
from tests.unit.trainer.checkpoint.resumed_runs import NUM_STEPS, Runs, ending, nothing
from tests.unit.trainer.runs import opener, pushes_of, run_config
from trainer import DistillationTrainer
from trainer import train as training
from trainer.checkpoint import folder
from trainer.checkpoint.attempt import next_attempt
from trainer.checkpoint.folder import open_checkpoint
from trainer.checkpoint.journal import read_journal
from trainer.data.stream import RowStream
from trainer.output.report import Summary
from trainer.pipeline import Pipeline
from trainer.session import Session


def check_same_run(runs: Runs, name: str = "out") -> None:
    """As if nobody had disturbed it: weights, optimizer, schedule, generators, and every row."""
    assert_same(runs.ends[-1], runs.ends[0])
    assert_same(runs.student(name), runs.student("whole"))
    for file in ("metrics.jsonl", "samples.jsonl", "journal.jsonl"):
        expected = [row for row in runs.rows(file, "whole") if not any(key.startswith("eval_") for key in row)]
        found = [row for row in runs.rows(file, name) if not any(key.startswith("eval_") for key in row)]
        assert found == expected, file


def failing_at(step: int) -> Any:
    return ending(step, PeerError("gone"))


def test_steps_an_end_and_steps_are_the_steps(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PeerError) as raised:
        runs.go(disturb=failing_at(3))
    path = runs.out() / "checkpoints" / "step-3"
    assert raised.value.__notes__ == [f"the same command goes on after step 3, from {path}"]
    assert runs.checkpoints() == [2, 3]
    summary = runs.go()
    assert f"going on after step 3, from {path}" in caplog.text
    check_same_run(runs)
    assert summary.steps == NUM_STEPS and summary.attempts == 2
    whole = json.loads((runs.out("whole") / "summary.json").read_text())
    assert summary.tokens == whole["tokens"] and whole["attempts"] == 1
    assert runs.checkpoints() == runs.checkpoints("whole") == [4, 6]


def without_a_way_out(session: Session) -> None:
    """Only what is written every two steps is there."""
    session._leave_checkpoint = lambda reason: session.checkpoints.wait()  # type: ignore[method-assign]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
def test_a_run_that_is_killed_goes_on_from_what_it_wrote_before(step: int, runs: Runs) -> None:
    def disturb(session: Session) -> None:
        failing_at(step)(session)
        without_a_way_out(session)

    with pytest.raises(PeerError):
        runs.go(disturb=disturb)
    session_wrote = [n for n in (2, 4) if n < step]
    assert runs.checkpoints() == session_wrote
    if not session_wrote:  # its student has to be replaced, for nothing can go on from it
        with pytest.raises(ConfigError, match="holds an earlier run"):
            runs.go()
        return
    runs.go()
    check_same_run(runs)


def test_a_run_goes_on_as_often_as_it_has_to(runs: Runs) -> None:
    for step in (1, 2, 3, 5):
        with pytest.raises(PeerError):
            runs.go(disturb=failing_at(step))
    assert runs.go().attempts == 5
    check_same_run(runs)
    journal = read_journal(runs.out())
    assert [(row["attempt"], row["from_step"]) for row in journal.attempts] == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 5)]
    assert [row["attempt"] for row in journal.steps] == [1, 2, 3, 4, 4, 5]
    journal.check(journal.attempts[0]["run"], NUM_STEPS, RowStream(range(8), seed=0, shuffle=False))


def test_an_attempt_that_ends_before_its_first_checkpoint_has_a_number_of_its_own(runs: Runs) -> None:
    with pytest.raises(PeerError):
        runs.go(disturb=failing_at(2))
    numbers = []
    for _ in range(2):
        with pytest.raises(PeerError):
            runs.go(disturb=lambda s: (numbers.append(s.record.attempt.number), failing_at(2)(s)))
    assert numbers == [2, 3]
    runs.go()
    check_same_run(runs)


def test_a_teacher_that_is_away_for_too_long_costs_the_time_and_nothing_else(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the fifth step the teacher closes every connection."""

    def disturb(session: Session) -> None:
        given = session.pipeline.next

        async def asking() -> bytes:
            if session.learner.finished_step < 4:
                return await given()
            monkeypatch.setattr(runs.teacher, "refuse", lambda body: (0, {}))
            return await Pipeline.next(session.pipeline)

        session.pipeline.next = asking  # type: ignore[method-assign]

    with pytest.raises(OutageError, match=r"no teacher has answered for 0.2 s \(teacher_client.outage_s\)") as raised:
        runs.go(disturb=disturb)
    assert raised.value.exit_code == 11
    assert raised.value.__notes__ == [
        f"the same command goes on after step 4, from {runs.out() / 'checkpoints' / 'step-4'}"
    ]
    monkeypatch.undo()
    runs.go()
    check_same_run(runs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_the_last_finished_step(number: int, runs: Runs) -> None:
    """In the middle of a forward pass, which has used random numbers that the step will use again."""

    def disturb(session: Session) -> None:
        forward, learner = session.learner._forward, session.learner

        def signalled(*arguments: Any, **options: Any) -> Any:
            output = forward(*arguments, **options)
            if learner.finished_step == 3 and torch.is_grad_enabled():
                os.kill(os.getpid(), number)
            return output

        learner._forward = signalled  # type: ignore[method-assign]

    with pytest.raises(Interrupted) as raised:
        runs.go(disturb=disturb)
    assert "goes on after step 3" in raised.value.__notes__[0]
    assert runs.checkpoints()[-1] == 3
    runs.go()
    check_same_run(runs)


def test_an_update_that_is_given_up_half_way_leaves_the_checkpoint_before(runs: Runs) -> None:
    """The weights are put back, the optimizer's moments are not."""

    def disturb(session: Session) -> None:
        step, calls = session.learner.optimizer.step, iter(range(1, 100))

        def failing() -> None:
            if next(calls) == 10:  # the second update of the fifth step
                raise PeerError("gone")
            step()

        session.learner.optimizer.step = failing  # type: ignore[method-assign, assignment]

    pipeline = {"updates_per_batch": 2}
    runs.go("two-updates", pipeline=pipeline)
    with pytest.raises(PeerError):
        runs.go(disturb=disturb, pipeline=pipeline)
    assert runs.checkpoints() == [2, 4]
    runs.go(pipeline=pipeline)
    assert_same(runs.ends[-1], runs.ends[1])


def test_a_lost_rank_leaves_what_was_written_before(runs: Runs) -> None:
    with pytest.raises(RankLostError) as raised:
        runs.go(disturb=ending(3, RankLostError("rank 1 was killed")))
    assert runs.checkpoints() == [2] and "goes on after step 2" in raised.value.__notes__[0]
    runs.go()
    check_same_run(runs)


def test_a_step_whose_rows_are_not_written_is_done_again(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def disturb(session: Session) -> None:
        def full(step: int, row: dict[str, float]) -> None:
            if step == 5:
                raise OutputError("metrics.jsonl cannot be written")
            write(step, row)

        write = session.record.step
        session.record.step = full  # type: ignore[method-assign]

    with pytest.raises(OutputError):
        runs.go(disturb=disturb)
    assert runs.checkpoints()[-1] == 4
    runs.go()
    check_same_run(runs)


def test_without_checkpoints_nothing_goes_on(runs: Runs) -> None:
    output = {"save_every_steps": 0}
    with pytest.raises(PeerError) as raised:
        runs.go(disturb=failing_at(2), output=output)
    assert not hasattr(raised.value, "__notes__") and not (runs.out() / "checkpoints").exists()
    with pytest.raises(ConfigError, match=r"holds an earlier run \(student\)"):
        runs.go(output=output)
    with pytest.raises(ConfigError, match=r"output\.resume = True: .* complete are those of steps: none"):
        runs.go(output={**output, "resume": True})


def test_a_run_that_goes_on_has_another_name_at_the_servers(runs: Runs) -> None:
    names = []
    with pytest.raises(PeerError):
        runs.go(disturb=lambda s: (names.append(s.record.attempt.holder), failing_at(2)(s)))
    runs.go(disturb=lambda s: names.append(s.record.attempt.holder))
    (first, _), (second, _) = (name.split("_") for name in names)
    assert (first[8:], second[8:]) == ("-1", "-2") and first[:8] == second[:8]


def test_a_copy_of_a_run_is_another_run_at_the_servers(runs: Runs) -> None:
    with pytest.raises(PeerError):
        runs.go(disturb=failing_at(3))
    shutil.copytree(runs.out(), runs.out("copy"))
    holders = []
    for name in ("out", "copy"):
        attempt = next_attempt(open_checkpoint(runs.out(name) / "checkpoints" / "step-3"))
        attempt.announce(runs.out(name))
        holders.append(attempt.holder)
    server = Holder()
    server.hold(holders[0], "a", 60.0)
    with pytest.raises(RequestError, match="is held by the run"):
        server.hold(holders[1], "b", 60.0)


def test_the_first_push_of_a_run_that_goes_on_is_of_its_last_step(runs: Runs) -> None:
    with pytest.raises(PeerError):
        runs.go(disturb=failing_at(3))
    pushed: list[int] = []
    runs.go(disturb=lambda s: setattr(pushes_of(s), "on_push", pushed.append))
    assert pushed == [3, 4, 5, 6]


def test_evaluations_are_made_once_and_the_first_one_is_not_made_again(runs: Runs) -> None:
    runs.documents.clear()
    evaluation = {"every_steps": 2}
    with pytest.raises(PeerError):
        runs.go(disturb=failing_at(3), evaluation=evaluation)
    runs.documents.clear()
    summary = runs.go(evaluation=evaluation)
    steps = [row["step"] for row in runs.rows("metrics.jsonl") if "eval_reverse_kl" in row]
    assert steps == [0, 2, 4, 6] and summary.before is not None and summary.before.policy_version == 0
    before = json.loads((runs.out("whole") / "summary.json").read_text())["before"]
    assert summary.before.reverse_kl == before["reverse_kl"]


def test_an_evaluation_that_was_due_when_the_run_ended_is_made(runs: Runs) -> None:
    runs.documents.clear()

    def disturb(session: Session) -> None:
        assert session.evaluator is not None
        evaluate = session.evaluator.evaluate

        def ended(learner: Any, policy_version: int) -> Any:
            if policy_version == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(learner, policy_version)

        session.evaluator.evaluate = ended  # type: ignore[method-assign]

    with pytest.raises(Interrupted):
        runs.go(disturb=disturb, evaluation={"every_steps": 2})
    runs.documents.clear()
    runs.go(evaluation={"every_steps": 2})
    assert [row["step"] for row in runs.rows("metrics.jsonl") if "eval_reverse_kl" in row] == [0, 2, 4, 6]


@pytest.mark.parametrize("part", ["begin", "complete"])
def test_a_best_student_that_cannot_be_kept_after_the_last_step_is_a_warning(
    part: str, runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    runs.documents.clear()
    real = getattr(folder, part)

    def disturb(session: Session) -> None:
        is_saved = False

        def full(path: Path, *others: Any) -> Any:
            if is_saved:
                raise OSError(28, "No space left on device")
            return real(path, *others)

        def last() -> None:  # the checkpoint of the last step is that of the best one
            nonlocal is_saved
            is_saved = True

        session._save = lambda save=session._save: (save(), last())[0]  # type: ignore[method-assign, misc]
        runs.monkeypatch.setattr(folder, part, full)

    assert runs.go(disturb=disturb, output={"keep_best": True, "save_every_steps": 4}).steps == NUM_STEPS
    assert (runs.out() / "summary.json").exists() and runs.checkpoints() == [4]
    warnings = [record.getMessage() for record in caplog.records if "step-6 cannot be written" in record.getMessage()]
    assert len(warnings) == 2 and "No space left on device" in warnings[0]


def test_a_link_in_the_place_of_a_step_that_is_done_again_goes(runs: Runs) -> None:
    output = {"save_total_limit": 9}
    with pytest.raises(PeerError):
        runs.go(disturb=failing_at(5), output=output)
    step = runs.out() / "checkpoints" / "step-4"
    elsewhere = step.rename(runs.tmp_path / "bigger-disk")
    step.symlink_to(elsewhere)
    runs.go(output={**output, "resume_step": 2})
    check_same_run(runs)
    assert (elsewhere / RESUME / "complete").exists() and not step.is_symlink()


@pytest.mark.parametrize("written", ["NaN", '"a"', "null"])
def test_what_is_no_number_in_the_metrics_is_not_the_best(written: str, runs: Runs) -> None:
    runs.documents.clear()
    sections: dict[str, Any] = {"evaluation": {"every_steps": 1}, "output": {"keep_best": True, "save_total_limit": 9}}
    with pytest.raises(PeerError):
        runs.go(disturb=failing_at(4), **sections)
    path = runs.out() / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (best,) = [row for row in rows if row["step"] == 3 and "eval_reverse_kl" in row]
    best["eval_reverse_kl"] = "@"
    path.write_text("".join(json.dumps(row).replace('"@"', written) + "\n" for row in rows))
    runs.documents.clear()
    measured: dict[int, float] = {}
    runs.go(disturb=lambda session: measured.update(session.checkpoints._reverse_kls), **sections)
    assert set(measured) == {1, 2} and (runs.out() / "summary.json").exists()


# ---------------------------------------------------------------------------------------- ends before it has begun


def test_a_run_that_ends_before_it_has_begun_leaves_the_student_of_the_one_before(runs: Runs) -> None:
    before = snapshot(runs.out("whole"))
    with pytest.raises(WeightSyncError) as raised:
        runs.go("whole", disturb=ending(4, WeightSyncError("torn")), output={"resume_step": 4})
    path = runs.out("whole") / "checkpoints" / "step-4"
    assert raised.value.__notes__ == [f"the same command goes on after step 4, from {path}"]
    now = snapshot(runs.out("whole"))
    assert now.pop("journal.jsonl").startswith(before.pop("journal.jsonl")) and now == before


@pytest.mark.parametrize("output", [{"overwrite": True}, {"resume_step": 4}], ids=str)
def test_trackers_that_refuse_do_so_before_anything_is_replaced(output: Any, runs: Runs) -> None:
    def disturb(session: Session) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError("wandb wants a key")

        session.record._accelerator.init_trackers = refuse  # type: ignore[method-assign]

    before = snapshot(runs.out("whole"))
    with pytest.raises(StartupError, match="wandb wants a key"):
        runs.go("whole", disturb=disturb, output=output)
    now = snapshot(runs.out("whole"))
    assert now.pop("journal.jsonl").startswith(before.pop("journal.jsonl")) and now == before


# --------------------------------------------------------------------------------------------------- what is refused


def ended(runs: Runs) -> Path:
    """The checkpoint that a run has left."""
    with pytest.raises(WeightSyncError):
        runs.go(disturb=ending(3, WeightSyncError("torn")))
    return complete_checkpoints(runs.out())[3]


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(folder / ".reserve"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"optimizer": {"learning_rate": 0.5}}, r"optimizer\.learning_rate was 0\.01 and is 0\.5"),
        ({"loss": {"gamma": 0.5}}, r"loss\.gamma was 1\.0 and is 0\.5|loss\.gamma was"),
        ({"seed": 7}, r"seed was 0 and is 7"),
        ({"pipeline": {"prompts_per_step": 2, "steps": 6}}, r"pipeline\.prompts_per_step was 4 and is 2"),
        ({"pipeline": {"steps": 2}}, r"pipeline\.steps = 2 is below the 3 steps"),
        ({"student": {"model_init_kwargs": {}}}, r"student\.model_init_kwargs differs"),
    ],
    ids=str,
)
def test_a_run_with_other_options_is_refused_by_their_names(sections: Any, named: str, runs: Runs) -> None:
    ended(runs)
    before = snapshot(runs.out())
    with pytest.raises(ConfigError, match=named):
        runs.go(**sections)
    assert snapshot(runs.out()) == before


def test_options_that_may_differ_do(runs: Runs) -> None:
    ended(runs)
    summary = runs.go(
        pipeline={"steps": 5, "tokens_per_micro_batch": 64, "max_quarantine_rate": 0.7},
        output={"save_every_steps": 3, "save_total_limit": 5, "project": "another"},
        evaluation={"every_steps": 5},
        weight_sync={"stage_timeout_s": 7},
        teacher_client={"outage_s": 0.3},
        rollout={"port": 8123},
    )
    assert summary.steps == 5


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(runs: Runs) -> None:
    with pytest.raises(ConfigError, match="holds an earlier run"):
        runs.go("whole", pipeline={"steps": 8})
    with pytest.raises(ConfigError, match=r"a complete run of pipeline\.steps = 6; raise that"):
        runs.go("whole", output={"resume": True})
    assert runs.go("whole", pipeline={"steps": 8}, output={"resume": True}).steps == 8


def test_a_finished_run_of_so_many_epochs_does_not_go_on(runs: Runs) -> None:
    runs.documents.clear()
    pipeline = {"steps": None, "epochs": 0.5}
    assert runs.go(pipeline=pipeline).steps == 1
    before = snapshot(runs.out())
    with pytest.raises(ConfigError, match=r"a complete run of the 1 steps that pipeline\.epochs comes to; raise that"):
        runs.go(pipeline=pipeline, output={"resume": True})
    assert snapshot(runs.out()) == before


def test_a_run_goes_on_from_the_step_that_is_asked_for(runs: Runs) -> None:
    with pytest.raises(PeerError):
        runs.go(disturb=failing_at(5), output={"save_total_limit": 9})
    with pytest.raises(ConfigError, match=r"output\.resume_step = 3: .* complete are those of steps: 2, 4, 5"):
        runs.go(output={"save_total_limit": 9, "resume_step": 3})
    runs.go(output={"save_total_limit": 9, "resume_step": 2})
    check_same_run(runs)


def test_a_run_that_is_to_be_replaced_is(runs: Runs) -> None:
    ended(runs)
    with pytest.raises(PeerError) as raised:
        runs.go(disturb=failing_at(1), output={"overwrite": True})
    assert raised.value.__notes__[0].startswith(
        "the same command with --resume in the place of --output.overwrite goes on"
    )
    assert runs.checkpoints() == [1]
    assert runs.go(output={"overwrite": True}).attempts == 1
    check_same_run(runs)


@pytest.mark.parametrize("name", ["model.safetensors", "resume/rank-0.safetensors", "resume/state.json", "config.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "edited"])
def test_a_file_that_is_not_as_it_was_written_is_refused_by_its_name(name: str, how: str, runs: Runs) -> None:
    path = ended(runs) / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        edited = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:-1] if how == "truncated" else edited)
    before = snapshot(runs.out())
    with pytest.raises(StartupError, match=rf"{path} is not as it was written"):
        runs.go()
    assert snapshot(runs.out()) == before
    if name != "resume/state.json":
        path.write_bytes(content)
        runs.go()
        check_same_run(runs)


def test_without_its_marker_a_folder_is_no_checkpoint(runs: Runs) -> None:
    (ended(runs) / RESUME / "complete").unlink()
    runs.go()  # from step 2
    check_same_run(runs)


@pytest.mark.parametrize("how", ["missing", "cut", "of another run", "a step twice", "no JSON"])
def test_a_journal_that_does_not_belong_to_the_checkpoint_is_refused(how: str, runs: Runs) -> None:
    ended(runs)
    path = runs.out() / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    changed = {
        "missing": None,
        "cut": lines[:-1],
        "of another run": (runs.out("whole") / "journal.jsonl").read_text().splitlines(keepends=True),
        "a step twice": [*lines, lines[-1]],
        "no JSON": ["{\n", *lines],
    }[how]
    path.unlink()
    if changed is not None:
        path.write_text("".join(changed))
    before = snapshot(runs.out())
    with pytest.raises(StartupError, match=r"journal\.jsonl"):
        runs.go()
    assert snapshot(runs.out()) == before


STATES: dict[str, Any] = {
    "step": lambda state: state.pop("step"),
    "num_ranks": lambda state: state.update(num_ranks=0),
    "files": lambda state: state.update(files=[]),
    "run": lambda state: state.update(run=3),
    "attempt": lambda state: state.update(attempt="2"),
    "wall_s": lambda state: state.update(wall_s="x"),
    "num_tokens": lambda state: state.pop("num_tokens"),
    "positions": lambda state: state.pop("positions"),
    "positions.prompts": lambda state: state["positions"].update(prompts=-3),
    "before": lambda state: state.update(before={"dict": [["a", 1]]}),
    "failed_evaluations": lambda state: state.update(failed_evaluations=[{"step": 1}]),
    "teachers": lambda state: state.update(teachers={"teacher.model": {}}),
    "learner.optimizer": lambda state: state.update(learner={}),
}


def edit_state(checkpoint: Path, edit: Any) -> None:
    """With the checksum that belongs to it."""
    path = checkpoint / RESUME / "state.json"
    state = json.loads(path.read_text())
    edit(state)
    content = json.dumps(state).encode()
    path.write_bytes(content)
    path.with_name("complete").write_text(blake3.blake3(content).hexdigest())


@pytest.mark.parametrize("name", STATES)
def test_a_value_that_is_edited_with_its_checksum_is_refused_by_its_name(name: str, runs: Runs) -> None:
    path = ended(runs)
    edit_state(path, STATES[name])
    before = snapshot(runs.out())
    named = rf"{path / RESUME / 'state.json'} is not as it was written: {name}[.\w]*: .*; remove {path} to go on"
    with pytest.raises(StartupError, match=named):
        runs.go()
    assert snapshot(runs.out()) == before


JOURNALS: dict[str, tuple[Any, str]] = {
    "a text": (lambda row: row.update(step="3"), "line 4 is no row of a journal"),
    "no groups": (lambda row: row.pop("groups"), "step 3 is no row of a step"),
    "no texts": (lambda row: row.pop("texts"), "step 3 is no row of a step"),
    "a number": (lambda row: row.update(prompts=3), "step 3 is no row of a step"),
    "no numbers": (lambda row: row.update(prompts=[]), "step 3 is no row of a step"),
    "another end": (lambda row: row.update(prompts=[8, 13]), "step 3 ends at .*13.* the checkpoint of it at .*12"),
}


@pytest.mark.parametrize("how", JOURNALS)
def test_a_row_of_the_journal_that_is_edited_is_refused_by_its_step(how: str, runs: Runs) -> None:
    ended(runs)
    edit, named = JOURNALS[how]
    path = runs.out() / "journal.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    edit(rows[-1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = snapshot(runs.out())
    with pytest.raises(StartupError, match=rf"journal\.jsonl.* {named}.*; .*begin anew with --output.overwrite true"):
        runs.go()
    assert snapshot(runs.out()) == before


def test_data_that_would_go_on_elsewhere_than_the_journal_ends_is_refused(runs: Runs) -> None:
    edit_state(ended(runs), lambda state: state["positions"].update(prompts=999))
    with pytest.raises(StartupError, match=r"journal\.jsonl .*: step 3 ends at .*12.* the checkpoint of it at .*999"):
        runs.go()


def test_a_journal_that_ends_in_half_a_line_is_no_obstacle(runs: Runs) -> None:
    ended(runs)
    with (runs.out() / "journal.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "attem')
    runs.go()
    check_same_run(runs)


def test_going_on_unpickles_nothing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(runs)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something is unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    runs.go()
    monkeypatch.undo()
    check_same_run(runs)


# ------------------------------------------------------------------------------------------------------- from Python

ROWS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(8)]


def go_from_python(
    runs: Runs,
    name: str = "out",
    disturb: Callable[[Session], None] = nothing,
    given: Mapping[str, Any] | None = None,
    **sections: dict[str, Any],
) -> Summary | None:
    """One attempt with a student and rows that are objects.

    Args:
        given: other objects.
    """
    objects = {"student": AutoModelForCausalLM.from_pretrained(runs.folder), "train_dataset": ROWS} | dict(given or {})
    base: dict[str, Any] = {"pipeline": {"steps": NUM_STEPS}, "output": {"save_every_steps": 2}}
    base |= {"rollout_client": {"urls": ["http://a:1"]}, "teacher_client": {"urls": [runs.teacher.url]}}
    merged = {key: base.get(key, {}) | sections.get(key, {}) for key in base.keys() | sections.keys()}
    config = run_config(runs.folder, runs.out(name), **merged)
    config = config.model_copy(update={"student": config.student.model_copy(update={"model": None})})
    runs.monkeypatch.setattr(training, "open_session", opener(runs.teacher, disturb))
    return DistillationTrainer(config, **objects).train()


def doubled(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def objects_in(folder: Path) -> dict[str, bytes]:
    """All files but logs, and the journal, in which every attempt has a line."""
    return {name: read for name, read in snapshot(folder).items() if not name.startswith(("logs/", "journal"))}


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({}, "gone"),  # after the options were compared
        ({"output": {"overwrite": True}}, "gone"),
        ({"optimizer": {"learning_rate": 0.5}}, r"optimizer\.learning_rate was 0\.01 and is 0\.5"),
    ],
    ids=str,
)
def test_a_start_that_is_refused_leaves_the_objects_of_the_run(sections: Any, named: str, runs: Runs) -> None:
    with pytest.raises(PeerError):
        go_from_python(runs, disturb=failing_at(3))
    before = objects_in(runs.out())
    assert {"data/train_dataset.jsonl", "models/student/model.safetensors"} < set(before)
    others = {"student": doubled(runs.folder), "train_dataset": ROWS[:3]}
    if named != "gone":  # what is new is gone as well
        others["eval_dataset"] = ROWS

    def refuse(session: Session) -> None:
        assert objects_in(runs.out())["data/train_dataset.jsonl"].count(b"\n") == 3
        raise ConfigError("gone")

    with pytest.raises(ConfigError, match=named):
        go_from_python(runs, disturb=refuse, given=others, **sections)
    assert objects_in(runs.out()) == before
    go_from_python(runs, given={"train_dataset": ROWS[:3]})  # whose rows the stand-ins do not compare
    assert objects_in(runs.out())["data/train_dataset.jsonl"].count(b"\n") == 3


def test_a_run_whose_folder_was_moved_goes_on(runs: Runs) -> None:
    with pytest.raises(PeerError):
        go_from_python(runs, disturb=failing_at(3), given={"eval_dataset": ROWS})
    runs.out().rename(runs.out("moved"))
    summary = go_from_python(runs, "moved", given={"eval_dataset": ROWS})
    assert summary is not None and summary.attempts == 2
