"""Checkpoints while a learner goes on: written beside it, whole under their names, the last few and the best kept."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.config import OutputConfig, RunConfig
from services.config.output_dir import complete_checkpoints
from services.errors import OutputError
from tests.unit.trainer.checkpoint.learners import learner_of
from tests.unit.trainer.samples import BATCH
from trainer.checkpoint import folder
from trainer.checkpoint.folder import open_checkpoint
from trainer.learner import Learner
from trainer.output.checkpoints import Checkpoints
from trainer.output.saving import SavedStudents
from trainer.tiny.pair import build_tokenizer


@pytest.fixture
def learner(tiny_model_folder: Any) -> Learner:
    return learner_of(RunConfig(student={"model": tiny_model_folder("llama")}, optimizer={"learning_rate": 1e-2}))


def checkpoints_of(learner: Learner, into: Path, **output: Any) -> Checkpoints:
    config = OutputConfig(dir=str(into), **output)
    return Checkpoints(config, learner, SavedStudents(config, learner.student.model, build_tokenizer()), lambda: None)


def made(checkpoints: Checkpoints, learner: Learner, steps: int) -> None:
    """So many steps, with a checkpoint after each where one is due."""
    for _ in range(steps):
        learner.step(BATCH)
        if checkpoints.is_due(learner.finished_step):
            checkpoints.make(learner.finished_step, {"config": {}})
    checkpoints.wait()


def names(into: Path) -> set[str]:
    return {path.name for path in (into / "checkpoints").iterdir()}


def test_checkpoints_are_kept_by_number_and_not_by_name(learner: Learner, tmp_path: Path) -> None:
    made(checkpoints_of(learner, tmp_path, save_every_steps=2, save_total_limit=2), learner, 12)
    assert names(tmp_path) == {"step-10", "step-12"}
    assert list(complete_checkpoints(tmp_path)) == [10, 12]


def test_the_learner_goes_on_while_one_is_written(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, complete = threading.Event(), folder.complete

    def slow(*arguments: Any) -> None:
        assert may_write.wait(20.0)
        complete(*arguments)

    monkeypatch.setattr(folder, "complete", slow)
    checkpoints = checkpoints_of(learner, tmp_path)
    learner.step(BATCH)
    expected = learner.student.model.lm_head.weight.detach().clone()
    checkpoints.make(1, {"config": {}})
    learner.step(BATCH)
    assert complete_checkpoints(tmp_path) == {} and checkpoints.newest is None
    may_write.set()
    checkpoints.wait()
    assert checkpoints.newest == tmp_path / "checkpoints" / "step-1"
    saved = AutoModelForCausalLM.from_pretrained(checkpoints.newest).lm_head.weight
    assert torch.equal(saved, expected) and not torch.equal(saved, learner.student.model.lm_head.weight)


@pytest.mark.parametrize("part", ["write_into", "write_part", "complete"])
def test_one_that_cannot_be_written_is_told_and_leaves_those_before(
    part: str, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoints_of(learner, tmp_path, save_every_steps=1, save_total_limit=1)
    made(checkpoints, learner, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OutputError, match="step-2 cannot be written: No space left"):
        patched.setattr(SavedStudents if part == "write_into" else folder, part, full)
        made(checkpoints, learner, 1)
    assert names(tmp_path) == {"step-1"} and open_checkpoint(tmp_path / "checkpoints" / "step-1").step == 1
    made(checkpoints, learner, 1)
    assert names(tmp_path) == {"step-3"}


def test_a_failure_that_nobody_waits_for_is_told_at_the_next_look(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoints_of(learner, tmp_path)
    monkeypatch.setattr(SavedStudents, "write_into", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    learner.step(BATCH)
    checkpoints.make(1, {"config": {}})
    assert checkpoints._thread is not None
    checkpoints._thread.join()
    with pytest.raises(OutputError, match="step-1 cannot be written: RuntimeError: a bug"):
        checkpoints.check()
    checkpoints.check()  # once


def test_the_best_one_is_kept_beside_the_last_ones(learner: Learner, tmp_path: Path) -> None:
    checkpoints = checkpoints_of(learner, tmp_path, save_every_steps=1, save_total_limit=1, keep_best=True)
    for reverse_kl, kept in ((0.5, {1}), (0.3, {2}), (0.4, {2, 3}), (0.3, {2, 4}), (0.2, {5})):
        made(checkpoints, learner, 1)
        checkpoints.evaluated(learner.finished_step, reverse_kl)
        checkpoints._prune()
        assert set(complete_checkpoints(tmp_path)) == kept


def test_the_best_one_is_kept_until_a_better_one_is_complete(learner: Learner, tmp_path: Path) -> None:
    checkpoints = checkpoints_of(learner, tmp_path, save_every_steps=1, save_total_limit=1, keep_best=True)
    made(checkpoints, learner, 1)
    checkpoints.evaluated(1, 0.5)
    made(checkpoints, learner, 1)
    assert checkpoints.evaluated(3, 0.3)
    checkpoints._prune()  # as by the one before, which was still being written
    assert set(complete_checkpoints(tmp_path)) == {1, 2}
    made(checkpoints, learner, 1)
    assert set(complete_checkpoints(tmp_path)) == {3}


def refusing_to_let_go(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Of the checkpoint of a step, as with `chmod -R a-w`."""
    unlink = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.parts[-3:-1] == (step, "resume") and self.exists():
            raise PermissionError(13, "Permission denied", str(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)


def test_an_old_one_that_cannot_be_removed_is_a_warning(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = checkpoints_of(learner, tmp_path, save_every_steps=1, save_total_limit=1)
    refusing_to_let_go(monkeypatch, "step-1")
    made(checkpoints, learner, 3)
    assert list(complete_checkpoints(tmp_path)) == [1, 3]
    (warning,) = (record.getMessage() for record in caplog.records if "stays" in record.getMessage())
    assert warning == f"{tmp_path / 'checkpoints' / 'step-1'} stays, it cannot be removed: Permission denied"


@pytest.mark.parametrize("finished_step", [0, 1])
def test_one_that_has_to_go_and_cannot_ends_the_run_in_one_line(
    finished_step: int, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(checkpoints_of(learner, tmp_path, save_every_steps=1), learner, 2)
    refusing_to_let_go(monkeypatch, "step-2")
    config = OutputConfig(dir=str(tmp_path))
    students = SavedStudents(config, learner.student.model, build_tokenizer())
    with pytest.raises(OutputError, match=r"step-2 cannot be written: Permission denied"):
        Checkpoints(config, learner, students, lambda: None, finished_step=finished_step).begin()


def test_the_best_one_is_to_be_made_where_none_was_due(learner: Learner, tmp_path: Path) -> None:
    checkpoints = checkpoints_of(learner, tmp_path, keep_best=True)
    measured = [checkpoints.evaluated(step, kl) for step, kl in enumerate((9.0, 0.5, 0.6, 0.5, float("nan"), 0.4))]
    assert measured == [False, True, False, False, False, True]
    assert not checkpoints_of(learner, tmp_path).evaluated(1, 0.1)


def test_one_that_is_there_is_not_written_again(learner: Learner, tmp_path: Path) -> None:
    checkpoints = checkpoints_of(learner, tmp_path, save_every_steps=1)
    made(checkpoints, learner, 1)
    before = (tmp_path / "checkpoints" / "step-1" / "resume" / "state.json").stat()
    checkpoints.make(1, {"config": {}})
    checkpoints.wait()
    assert (tmp_path / "checkpoints" / "step-1" / "resume" / "state.json").stat() == before


def test_a_run_that_goes_on_removes_what_is_to_be_done_again(learner: Learner, tmp_path: Path) -> None:
    made(checkpoints_of(learner, tmp_path, save_every_steps=1, save_total_limit=9), learner, 3)
    (tmp_path / "checkpoints" / ".step-4.part" / "resume").mkdir(parents=True)
    config = OutputConfig(dir=str(tmp_path))
    students = SavedStudents(config, learner.student.model, build_tokenizer())
    Checkpoints(config, learner, students, lambda: None, finished_step=2).begin()
    assert names(tmp_path) == {"step-1", "step-2"}


def test_a_run_that_begins_makes_students_of_what_is_there(learner: Learner, tmp_path: Path) -> None:
    made(checkpoints_of(learner, tmp_path, save_every_steps=1), learner, 1)
    checkpoints_of(learner, tmp_path).begin()
    assert complete_checkpoints(tmp_path) == {} and names(tmp_path) == {"step-1"}


def test_a_checkpoint_lists_all_of_its_files(learner: Learner, tmp_path: Path) -> None:
    made(checkpoints_of(learner, tmp_path, save_every_steps=1), learner, 1)
    path = tmp_path / "checkpoints" / "step-1"
    listed = json.loads((path / "resume" / "state.json").read_text())["files"]
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert there - set(listed) == {"resume/state.json", "resume/complete"} and set(listed) < there
    assert {"model.safetensors", "config.json", "tokenizer.json", "resume/rank-0.safetensors"} <= set(listed)
