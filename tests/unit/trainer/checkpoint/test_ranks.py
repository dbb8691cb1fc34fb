"""A checkpoint of two ranks goes on in one, and of one in two, whatever a rank holds of the student."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.config import RunConfig
from services.config.output_dir import complete_checkpoints, find_checkpoint
from tests.models import save_model
from tests.unit.trainer.checkpoint.learners import NUM_STEPS, learner_of
from tests.unit.trainer.samples import BATCH, batch_of, sample
from tests.unit.trainer.two_ranks import Leading, run_pair
from trainer.checkpoint import folder
from trainer.checkpoint.folder import open_checkpoint, rank_file
from trainer.learner import Learner
from trainer.output.checkpoints import Checkpoints
from trainer.output.saving import SavedStudents
from trainer.tiny.pair import build_tokenizer

BATCHES = [BATCH, batch_of([sample(i, 3, 4 + i) for i in range(3)]), BATCH, batch_of([sample(9, 2, 7)])]
WAYS: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "ddp": {"parallelism": "ddp"},
}


def config_of(tmp_path: Path, name: str, way: str = "fsdp2", model: str = "llama") -> RunConfig:
    folder = tmp_path / "model"
    return RunConfig(
        student={
            "model": str(folder) if folder.exists() else save_model(folder, model, vocab_size=263)
        },  # odd: uneven slices
        # Of gradients that are nearly nothing AdamW makes steps of any sign, unless eps is larger.
        optimizer={"learning_rate": 1e-3, "weight_decay": 0.1, "eps": 1e-4},
        trainer=WAYS[way],
        output={"dir": str(tmp_path / name), "save_every_steps": 1},
    )


def steps(learner: Learner, config: RunConfig, first: int, last: int) -> None:
    """From one step to another, with a checkpoint after the last one."""
    students = SavedStudents(config.output, learner.student.model, build_tokenizer())
    for step in range(first, last + 1):
        learner.step(BATCHES[step - 1])
    checkpoints = Checkpoints(config.output, learner, students, lambda: None, finished_step=first - 1)
    checkpoints.make(last, {"config": config.model_dump(mode="json"), "num_steps": NUM_STEPS})
    checkpoints.wait()


def on_two_ranks(first: int, last: int, leading: Leading, into: Path) -> Any:
    config = leading.learner.config
    if (path := find_checkpoint(config)) is not None:
        leading.learner.resume(open_checkpoint(path))
    steps(leading.learner, config, first, last)


def on_one_rank(config: RunConfig, first: int, last: int) -> None:
    path = find_checkpoint(config)
    steps(learner_of(config, checkpoint=None if path is None else open_checkpoint(path)), config, first, last)


def pair(config: RunConfig, into: Path, first: int, last: int) -> None:
    found = run_pair(config, into, partial(on_two_ranks, first, last))
    assert found == [{"result": None}, {"result": None}], found


def state_of(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint, whole."""
    path = complete_checkpoints(Path(config.output.dir))[step]
    checkpoint = open_checkpoint(path)
    files, state = checkpoint.rank_files(), checkpoint.state["learner"]["state"]
    moments = {f"{name}/{key}": files.read(f"optimizer/{name}/{key}") for name in state for key in state[name]}
    weights = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    return moments | weights


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_ranks_may_come_and_go(way: str, tmp_path: Path) -> None:
    one, two = config_of(tmp_path, "one", way), config_of(tmp_path, "two", way)
    on_one_rank(one, 1, 2)
    pair(two, tmp_path, 1, 2)
    parts = [rank_file(complete_checkpoints(tmp_path / "two")[2], rank) for rank in range(2)]
    sizes = [part.stat().st_size for part in parts]
    assert min(sizes) * 3 > max(sizes) if way == "fsdp2" else min(sizes) * 50 < max(sizes)  # ddp: nothing twice
    assert_close(state_of(two, 2), state_of(one, 2))
    for name in ("one", "two"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-later")
    on_one_rank(one, 3, 4)
    pair(two, tmp_path, 3, 4)
    pair(config_of(tmp_path, "one-later", way), tmp_path, 3, 4)
    on_one_rank(config_of(tmp_path, "two-later", way), 3, 4)
    expected = state_of(one, 4)
    for name in ("two", "one-later", "two-later"):
        assert_close(state_of(config_of(tmp_path, name, way), 4), expected)


def failing(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def break_writing() -> None:
    """In this process a rank's part cannot be written."""
    folder.write_rank_file = failing


def test_a_part_that_cannot_be_written_is_told_by_the_name_of_its_rank(tmp_path: Path) -> None:
    config = config_of(tmp_path, "two")
    leader, _ = run_pair(config, tmp_path, partial(on_two_ranks, 1, 2), break_writing)
    assert leader["error"].startswith("OutputError: rank 1 on ") and "No space left on device" in leader["error"]
    assert "need output.dir on a file system that they share" in leader["error"]
    assert complete_checkpoints(tmp_path / "two") == {}


def rehearse(leading: Leading, into: Path) -> list[str]:
    """What is left in the folder."""
    learner, output = leading.learner, leading.learner.config.output
    Checkpoints(output, learner, leading.students, lambda: None).rehearse()
    return [path.name for path in (Path(output.dir) / "checkpoints").iterdir()]


def write_elsewhere() -> None:
    """In this process output.dir is a folder of its own, as it is on another machine."""
    write = folder.write_rank_file
    folder.write_rank_file = lambda path, *given: write(path.with_name("elsewhere"), *given)


def look_elsewhere() -> None:
    """In this process there is no output.dir."""
    write = folder.write_rank_file
    folder.write_rank_file = lambda path, *given: write(Path("/nowhere") / path.name, *given)


def test_ranks_that_share_the_folder_leave_nothing_in_it(tmp_path: Path) -> None:
    leader, _ = run_pair(config_of(tmp_path, "two"), tmp_path, rehearse)
    assert leader == {"result": []}


@pytest.mark.parametrize(
    ("somewhere", "message"),
    [
        (
            write_elsewhere,
            "checkpoints/step-0 cannot be written: the file of rank 1 is not there; put output.dir on a file",
        ),
        (look_elsewhere, "need output.dir on a file system that they share"),
    ],
)
def test_ranks_that_do_not_share_the_folder_are_told_so_before_the_first_step(
    somewhere: Callable[[], None], message: str, tmp_path: Path
) -> None:
    leader, _ = run_pair(config_of(tmp_path, "two"), tmp_path, rehearse, somewhere)
    assert leader["error"].startswith("OutputError: ") and message in leader["error"], leader
    assert list((tmp_path / "two" / "checkpoints").iterdir()) == []
