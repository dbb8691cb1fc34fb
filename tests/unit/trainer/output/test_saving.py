"""Students on disk: whole, loadable, replaced only by whole ones, and with room for the last one."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.config import OutputConfig, RunConfig
from services.errors import OutputError, StartupError
from tests.unit.services.hub.finished_runs import BEFORE, finished_run
from trainer.output import saving
from trainer.output.saving import SavedStudents
from trainer.student import load_student
from trainer.tiny.pair import build_tokenizer
from trainer.weights.snapshot import StudentState


@pytest.fixture
def model(tiny_model_folder: Any) -> Any:
    return load_student(RunConfig(student={"model": tiny_model_folder("qwen3")}).student).model


def students(folder: Path, model: Any, *, has_begun: bool = False, **output: Any) -> SavedStudents:
    config = OutputConfig(dir=str(folder), **output)
    return SavedStudents(config, model, build_tokenizer(), has_begun=has_begun)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.arange(40).view(2, 20)).logits


def test_what_is_saved_computes_what_the_trainer_does(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    students(tmp_path, model).save(StudentState(3))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab() == build_tokenizer().get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), safetensors.SafetensorError("I/O error"), RuntimeError("shared")],
)
def test_a_save_that_fails_leaves_the_student_before(
    error: Exception, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = students(tmp_path, model)
    saved.save(StudentState(1))
    before = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student"))

    def full(folder: Path) -> None:
        (Path(folder) / "half").touch()
        raise error

    monkeypatch.setattr(saving, "sync_folder", full)
    with pytest.raises(
        OutputError, match=r"student cannot be written: (No space left|SafetensorError: I/O error|RuntimeError: shared)"
    ):
        saved.save(StudentState(2))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), before)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_room_for_one_student_is_held_until_it_is_saved(model: Any, tmp_path: Path) -> None:
    saved = students(tmp_path, model)
    saved.reserve(10)
    saved.step_finished(partial(StudentState, 1))
    held = sum(path.stat().st_blocks * 512 for path in (tmp_path / ".reserve").iterdir())
    saved.save(StudentState(1))
    assert not (tmp_path / ".reserve").exists()
    assert held >= sum(path.stat().st_size for path in (tmp_path / "student").iterdir())


def test_a_disk_without_room_is_refused_before_the_first_step(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 20 << 20
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: type("", (), {"free": room}))
    students(tmp_path, model, save_every_steps=10, save_total_limit=2).reserve(20)  # 3 of 5 MiB
    with pytest.raises(StartupError, match=r"20 MiB left, the run saves 5 students .* output\.save_total_limit"):
        students(tmp_path, model, save_every_steps=10, save_total_limit=3).reserve(100)
    students(tmp_path, model, save_every_steps=0, save_total_limit=3).reserve(100)


def test_room_is_counted_for_the_student_of_an_earlier_run_until_it_goes(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: type("", (), {"free": 7 << 20}))
    students(tmp_path / "new", model, save_every_steps=0).reserve(5)
    (tmp_path / "used" / "student").mkdir(parents=True)
    with pytest.raises(StartupError, match=r"7 MiB left, the run saves 2 students"):
        students(tmp_path / "used", model, save_every_steps=0).reserve(5)


def test_room_is_counted_once_for_the_checkpoints_of_a_run_that_goes_on(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = {"save_every_steps": 10, "save_total_limit": 2}
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: type("", (), {"free": 1 << 20}))
    for step, num_students in ((0, 4), (10, 3), (20, 2), (30, 1), (40, 1)):
        if step:
            (tmp_path / "checkpoints" / f"step-{step}" / "resume").mkdir(parents=True)
            (tmp_path / "checkpoints" / f"step-{step}" / "resume" / "complete").touch()
        with pytest.raises(StartupError, match=rf"the run saves {num_students} students .* {num_students - 1} states"):
            students(tmp_path, model, has_begun=True, **output).reserve(100)
        with pytest.raises(StartupError, match=r"the run saves 4 students .* 3 states"):  # of another run
            students(tmp_path, model, **output).reserve(100)


def test_room_is_counted_for_the_best_checkpoint_as_well(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: type("", (), {"free": 1 << 20}))
    for num_steps, num_students in ((100, 5), (20, 4)):
        with pytest.raises(StartupError, match=f"the run saves {num_students} students"):
            output = {"save_every_steps": 10, "save_total_limit": 2, "keep_best": True}
            students(tmp_path, model, **output).reserve(num_steps)


@pytest.mark.parametrize("is_killed", [False, True])
def test_whoever_is_ended_between_the_two_renames_has_a_student(
    is_killed: bool, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students(tmp_path, model).save(StudentState(1))
    replace = Path.replace

    def ended(self: Path, target: Path) -> Path:
        if self.name == ".student.part":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", ended)
        if is_killed:
            patched.setattr(saving, "_put_back", lambda path: None)
        students(tmp_path, model).save(StudentState(2))
    assert (tmp_path / "student").exists() is not is_killed
    students(tmp_path, model).reserve(1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").num_parameters() > 0


def test_a_configuration_that_cannot_be_saved_is_found_before_the_first_step(
    tiny_model_folder: Any, tmp_path: Path
) -> None:
    """As with models whose generation_config.json gives a temperature to greedy decoding."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("qwen3"))
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    with pytest.raises(StartupError, match=r"the student could not be saved: .*GenerationConfig"):
        students(tmp_path, model).reserve(1)


def test_an_earlier_run_is_replaced_by_the_first_finished_step(model: Any, tmp_path: Path) -> None:
    for name in ("student", "checkpoints/step-7"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"earlier": True}))
    saved = students(tmp_path, model, save_every_steps=2)
    saved.reserve(4)
    assert (tmp_path / "student").exists() and (tmp_path / "checkpoints" / "step-7").exists()
    saved.step_finished(partial(StudentState, 1))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), logits(model))
    assert not (tmp_path / "checkpoints").exists()


def test_a_first_step_is_not_saved_where_no_earlier_run_is(model: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-1.part").mkdir(parents=True)
    students(tmp_path, model, save_every_steps=1).step_finished(partial(StudentState, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_what_a_killed_save_left_behind_is_no_obstacle(model: Any, tmp_path: Path) -> None:
    for name in ("student", ".student.before", ".student.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    students(tmp_path, model).save(StudentState(3))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").num_parameters() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_first_step_that_is_only_saved_replaces_it_too(model: Any, tmp_path: Path) -> None:
    for name in ("student", "checkpoints/step-7"):
        (tmp_path / name).mkdir(parents=True)
    students(tmp_path, model).save(StudentState(1))
    assert (tmp_path / "student" / "config.json").exists() and not (tmp_path / "checkpoints").exists()


def test_a_students_card_says_what_the_run_has_recorded(model: Any, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", None, steps=7, evaluations={0: BEFORE})
    saved = students(run, model)
    saved.save(StudentState(7))
    assert "| steps | 7 of 20 " in (run / "student" / "README.md").read_text()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "num_steps": 20}\n')
    saved.write_card()
    card = (run / "student" / "README.md").read_text()
    assert "| steps | 8 of 20 " in card and 'from_pretrained("./run/student")' in card
    AutoModelForCausalLM.from_pretrained(run / "student")


def test_a_card_that_cannot_be_made_costs_a_warning_and_not_the_student(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    students(tmp_path, model).save(StudentState(1))
    assert "the student has no model card" in caplog.text and "config.json cannot be read" in caplog.text
    AutoModelForCausalLM.from_pretrained(tmp_path / "student")
