"""Killed, or out of room, at every point at which a checkpoint is written: one that is complete is always there and loads."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from services.config import OutputConfig, RunConfig
from services.config.output_dir import complete_checkpoints
from services.errors import ConfigError, OutputError, PeerError
from tests.small_disk import small_disk_at
from tests.unit.trainer.checkpoint import learners
from tests.unit.trainer.checkpoint.learners import all_state, assert_same, learner_of
from tests.unit.trainer.checkpoint.resumed_runs import NUM_STEPS, Runs, ending
from tests.unit.trainer.checkpoint.write_points import DONE, REFUSED, count_points, full_from, in_child, killed_at
from tests.unit.trainer.samples import BATCH
from trainer.checkpoint import folder
from trainer.checkpoint.folder import open_checkpoint
from trainer.learner import Learner
from trainer.output.checkpoints import Checkpoints
from trainer.output.saving import SavedStudents
from trainer.tiny.pair import build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@pytest.fixture(scope="module")
def config(tiny_model_folder: Any) -> RunConfig:
    return RunConfig(student={"model": tiny_model_folder("llama")}, optimizer={"learning_rate": 1e-2})


@pytest.fixture(scope="module")
def learner(config: RunConfig) -> Learner:
    """After one step."""
    found = learner_of(config)
    found.step(BATCH)
    return found


def writer(learner: Learner, into: Path, finished_step: int = 0) -> Checkpoints:
    output = OutputConfig(dir=str(into), save_every_steps=1, save_total_limit=1)
    students = SavedStudents(output, learner.student.model, build_tokenizer())
    return Checkpoints(output, learner, students, lambda: None, finished_step=finished_step)


def write(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.make(step, {"config": {}, "num_steps": learners.NUM_STEPS})
    checkpoints.wait()


@pytest.fixture
def first(learner: Learner, tmp_path: Path) -> Path:
    """A folder with a checkpoint of step 1."""
    write(writer(learner, tmp_path / "first"), 1)
    return tmp_path / "first"


def check_whole(into: Path, config: RunConfig, expected: dict[str, Any]) -> int:
    """The newest checkpoint is as it was written, and loads; returns its step."""
    step, path = list(complete_checkpoints(into).items())[-1]
    found = all_state(learner_of(config, checkpoint=open_checkpoint(path)))
    assert_same(found | {"step": 1, "rng": 0}, expected | {"rng": 0})
    return step


def test_killed_at_every_write_point_a_complete_one_is_loaded(
    learner: Learner, config: RunConfig, first: Path, tmp_path: Path
) -> None:
    expected, newest = all_state(learner), []
    whole = copy_of(first, tmp_path / "whole")
    last = count_points(lambda: write(writer(learner, whole, 1), 2))
    for number in range(1, last + 1):
        into = copy_of(first, tmp_path / "killed")
        killed_at(number, lambda into=into: write(writer(learner, into, 1), 2))  # type: ignore[misc]
        newest.append(max(complete_checkpoints(into)))
        open_checkpoint(complete_checkpoints(into)[newest[-1]])
        if newest[-2:] in ([1], [1, 2]):  # the others are the same bytes
            assert check_whole(into, config, expected) == newest[-1]
    assert newest == sorted(newest) and set(newest) == {1, 2} and last > 15


def test_a_disk_that_is_full_from_any_write_point_on_leaves_the_one_before(
    learner: Learner, config: RunConfig, first: Path, tmp_path: Path
) -> None:
    ends, whole = [], copy_of(first, tmp_path / "whole")
    last = count_points(lambda: write(writer(learner, whole, 1), 2))
    for number in range(1, last + 1):
        into = copy_of(first, tmp_path / "full")
        ends.append(full_from(number, lambda into=into: write(writer(learner, into, 1), 2), OutputError))  # type: ignore[misc]
        *_, newest = complete_checkpoints(into).values()
        open_checkpoint(newest)
        if ends[-1] == REFUSED and newest.name == "step-1":
            assert [path.name for path in (into / "checkpoints").iterdir()] == ["step-1"]
    # What is left to do after the last write is to remove the one before.
    assert set(ends) <= {DONE, REFUSED} and ends[0] == REFUSED and ends == sorted(ends, reverse=True)


def copy_of(path: Path, into: Path) -> Path:
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(path, into)
    return into


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk_at(tmp_path / "disk", mib=4))
        except subprocess.CalledProcessError:
            pytest.skip("this container may not mount a disk")
        yield disk


def test_a_real_disk_that_is_full_leaves_the_one_before(learner: Learner, config: RunConfig, small_disk: Path) -> None:
    write(writer(learner, small_disk), 1)
    filler = small_disk / "filler"
    for free in (0, 1 << 12, 1 << 16, 1 << 19, 1 << 20):
        filler.write_bytes(b"0" * max(0, shutil.disk_usage(small_disk).free - free))
        with pytest.raises(OutputError, match=r"step-2.* cannot be written"):
            write(writer(learner, small_disk, 1), 2)
        filler.unlink()
    assert check_whole(small_disk, config, all_state(learner)) == 1
    write(writer(learner, small_disk, 1), 2)
    assert check_whole(small_disk, config, all_state(learner)) == 2


# ------------------------------------------------------------------------------------------------------- a whole run


def check_goes_on(runs: Runs, name: str) -> None:
    """A run that was killed goes on, begins where there is nothing to go on from, or was complete already; and it is the one that
    nobody disturbed."""
    if not (runs.out(name) / "summary.json").exists():
        if complete_checkpoints(runs.out(name)):
            assert runs.go(name).attempts > 1
        else:
            runs.go(name, output={"overwrite": (runs.out(name) / "student").exists()})
        assert_same(runs.ends[-1], runs.ends[0])
    assert_same(runs.student(name), runs.student("whole"))
    assert runs.rows("journal.jsonl", name) == runs.rows("journal.jsonl", "whole")
    assert [row["step"] for row in runs.rows("metrics.jsonl", name)] == list(range(1, NUM_STEPS + 1))


def each(last: int, count: int) -> list[int]:
    """So many numbers of 1 to `last`, evenly spread."""
    return sorted({1 + index * (last - 1) // (count - 1) for index in range(count)})


def kill_and_go_on(runs: Runs, count: int) -> None:
    last = count_points(lambda: go(runs, "counted"))
    for number in each(last, min(count, last)):
        name = f"killed-{number}"
        killed_at(number, lambda name=name: go(runs, name))  # type: ignore[misc]
        check_goes_on(runs, name)
        shutil.rmtree(runs.out(name))


def go(runs: Runs, name: str) -> None:
    runs.go(name)


def test_a_run_that_is_killed_while_it_writes_goes_on(runs: Runs) -> None:
    kill_and_go_on(runs, 6)


def test_a_run_that_is_killed_while_it_writes_its_first_checkpoint_begins_again(runs: Runs) -> None:
    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        runs.monkeypatch.setattr(folder, "complete", kill)
        runs.go()

    assert in_child(killed, KeyboardInterrupt, lambda event, number: None)[0] == -signal.SIGKILL
    assert [path.name for path in (runs.out() / "checkpoints").iterdir()] == [".step-2.part"]
    check_goes_on(runs, "out")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_at_any_write_goes_on(runs: Runs) -> None:
    kill_and_go_on(runs, 10_000)


def test_a_run_that_is_killed_while_it_goes_on_goes_on(runs: Runs) -> None:
    """While it cuts back the rows of what is done again, and afterwards."""
    with pytest.raises(PeerError):
        runs.go("ended", ending(5, PeerError("gone")))
    shutil.rmtree(runs.out("ended") / "checkpoints" / "step-5")
    for number in (1, 2, 3, 4, 6, 9, 13):
        name = f"killed-{number}"
        copy_of(runs.out("ended"), runs.out(name))
        killed_at(number, lambda name=name: go(runs, name))  # type: ignore[misc]
        check_goes_on(runs, name)


def test_nothing_goes_on_without_its_checkpoint(runs: Runs) -> None:
    with pytest.raises(PeerError):
        runs.go(disturb=ending(1, PeerError("gone")))
    shutil.rmtree(runs.out() / "checkpoints")
    with pytest.raises(ConfigError, match=r"holds an earlier run \(student\)"):
        runs.go()
