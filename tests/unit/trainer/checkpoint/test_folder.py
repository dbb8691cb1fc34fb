"""A checkpoint whose bytes are not those that were written is refused, by the name of the file."""

import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from services.config import RunConfig
from services.errors import StartupError
from tests.unit.trainer.checkpoint.learners import learner_of, written
from tests.unit.trainer.samples import BATCH
from trainer.checkpoint.folder import open_checkpoint, remove


@pytest.fixture(scope="module")
def good(tiny_model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    config = RunConfig(student={"model": tiny_model_folder("llama")})
    learner = learner_of(config)
    learner.step(BATCH)
    into = tmp_path_factory.mktemp("good") / "checkpoints" / "step-1"
    return written(learner.capture(into), config, learner.student.model, into).path


@pytest.fixture
def checkpoint(good: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(good, tmp_path / "checkpoints" / "step-1"))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_that_is_changed_added_or_cut_off_is_found(data: st.DataObject, checkpoint: Path) -> None:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    changed = data.draw(
        st.sampled_from(
            [
                content[:place] + bytes([content[place] ^ (1 << data.draw(st.integers(0, 7)))]) + content[place + 1 :],
                content[:place],
                content + b"\0",
            ]
        )
    )
    path.write_bytes(changed)
    # What the checksum of state.json is in is told with that.
    named = path.with_name("state.json") if path.name == "complete" else path
    try:
        with pytest.raises(StartupError, match=f"^{named} is not as it was written"):
            open_checkpoint(checkpoint)
    finally:
        path.write_bytes(content)


def test_a_file_that_nobody_wrote_is_refused(checkpoint: Path) -> None:
    (checkpoint / ".nfs0001").touch()  # of a file system, and nothing reads it
    open_checkpoint(checkpoint)
    (checkpoint / "adapter_config.json").touch()
    with pytest.raises(StartupError, match=r"adapter_config\.json is not as it was written: nobody wrote it there"):
        open_checkpoint(checkpoint)


def test_of_a_link_to_a_checkpoint_the_link_is_removed(checkpoint: Path) -> None:
    link = checkpoint.with_name("step-2")
    link.symlink_to(checkpoint)
    remove(link)
    assert not link.is_symlink() and open_checkpoint(checkpoint).step == 1


def test_a_checkpoint_under_the_name_of_another_step_is_refused(checkpoint: Path) -> None:
    with pytest.raises(StartupError, match=r"state\.json is not as it was written: it is of step 1"):
        open_checkpoint(checkpoint.rename(checkpoint.with_name("step-2")))


@pytest.mark.parametrize("name", ["model.safetensors", "resume/rank-0.safetensors", "resume/state.json"])
def test_a_file_that_is_gone_is_refused(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(StartupError, match=f"^{checkpoint / name} is not as it was written: .*(missing|No such file)"):
        open_checkpoint(checkpoint)
