"""The student on disk: after a run, however it ends; what is kept every few steps is in checkpoints.py.

student/                 the student of the last finished step, as a folder of safetensors with its tokenizer; its adapter merged
student/adapter/         the adapter alone, where one is trained, as peft loads it
student/README.md        its model card, written again when the run is complete
checkpoints/step-N/      the same after step N, and what it takes to go on from there (checkpoints.py)
.reserve/                room for one student, held until the last one is saved: a disk that fills up meanwhile costs
                         metrics, not the student

A folder is written beside its place and renamed into it, so under these names there is never half a student.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.config import OutputConfig
from services.config.output_dir import complete_checkpoints, students_in
from services.errors import DistillServeError, OutputError, StartupError
from services.hub.card import model_card
from services.hub.run_folder import read_records
from services.models.adapters import has_adapter
from services.process.files import cannot_write, sync_folder, write_by_rename
from trainer.lora import save_adapter
from trainer.weights.snapshot import StudentState

logger = logging.getLogger(__name__)

# What a folder holds beside the weights and the tokenizer.
_OTHER_BYTES = 4 << 20


class SavedStudents:
    """The students of one run.

    Args:
        has_begun: a student of this run is in the place of those of an earlier one.
    """

    def __init__(
        self,
        output: OutputConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        has_begun: bool = False,
    ) -> None:
        self._dir, self._limit = Path(output.dir), output.save_total_limit
        self._every, self._keeps_best = output.save_every_steps, output.keep_best
        self._model, self._tokenizer = model, tokenizer
        self._has_begun = has_begun

    def reserve(self, num_steps: int) -> None:
        """Find out before the first step what would keep the last one's student from being saved, and keep room for it.

        Raises:
            StartupError: the student's configuration cannot be saved, or there is no room.
        """
        reserve = self._dir / ".reserve"
        # The last few, the one that is being written, and the best one.
        checkpoints = min(self._limit + 1, num_steps // self._every) + self._keeps_best if self._every else 0
        if self._has_begun:  # those that are there give their room to newer ones
            checkpoints = max(0, checkpoints - len(complete_checkpoints(self._dir)))
        try:
            self.release()  # what a killed run held
            _put_back(self._dir / "student")
            reserve.mkdir(parents=True)
            self._model.config.save_pretrained(reserve)
            if self._model.generation_config is not None:
                self._model.generation_config.save_pretrained(reserve)
            self._tokenizer.save_pretrained(reserve)
            weights = sum(p.numel() * p.element_size() for p in self._model.parameters()) + _OTHER_BYTES
            # AdamW's two moments, of every parameter that is trained.
            moments = 2 * sum(p.numel() * p.element_size() for p in self._model.parameters() if p.requires_grad)
            # The first step's student is written before that of an earlier run goes.
            count = 1 + max(checkpoints, not self._has_begun and bool(students_in(self._dir)))
            needed, free = count * weights + checkpoints * moments, shutil.disk_usage(reserve).free
            if needed > free:
                raise StartupError(
                    f"output.dir = {str(self._dir)!r} has {free >> 20} MiB left, the run saves {count} students of "
                    f"{weights >> 20} MiB and {checkpoints} states of the optimizer of {moments >> 20} MiB; free some, or lower "
                    "output.save_total_limit or set output.save_every_steps = 0"
                )
            with (reserve / "room").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, weights)
        except OSError as error:
            raise StartupError(f"output.dir = {str(self._dir)!r} cannot hold the student: {error}") from error
        except (ValueError, TypeError) as error:
            raise StartupError(
                f"the student could not be saved: {str(error).splitlines()[0]}; mend its folder"
            ) from error

    def release(self) -> None:
        """Give up the reserved room."""
        _remove(self._dir / ".reserve")

    def step_finished(self, state: Callable[[], StudentState]) -> None:
        """The first step's student takes the place of those of an earlier run in this folder.

        Args:
            state: called where the student is written.

        Raises:
            OutputError: it cannot be written.
        """
        if not self._has_begun:
            self._has_begun = True
            if students_in(self._dir):
                self._write(self._dir / "student", state())
                _remove(self._dir / "checkpoints")

    def save(self, state: StudentState) -> Path:
        """Put a student into student/, which is returned.

        Raises:
            OutputError: it cannot be written.
        """
        self.release()
        self._write(self._dir / "student", state)
        if not self._has_begun:
            _remove(self._dir / "checkpoints")
        self.write_card()
        logger.info("the student of step %d is saved in %s", state.step, self._dir / "student")
        if has_adapter(self._model) and state.adapter is None:
            logger.warning(
                "its adapter alone is lost with the rank that was killed; the student is whole, with it merged"
            )
        return self._dir / "student"

    def write_card(self) -> None:
        """Put what the run has recorded so far into student/README.md; a failure is a warning, for the student is there."""
        try:
            card = model_card(read_records(self._dir))
            write_by_rename(self._dir / "student" / "README.md", card.encode())
        except (DistillServeError, OSError, ValueError) as error:
            logger.warning("the student has no model card: %s", error)

    def write_into(self, folder: Path, state: StudentState) -> None:
        """Write a student, its tokenizer and its adapter into a folder.

        Raises:
            OSError, OutputError, Exception: of safetensors, of a model's own code.
        """
        # The names of tensors that are given are a checkpoint's already.
        self._model.save_pretrained(folder, state_dict=state.tensors, save_original_format=state.tensors is None)
        self._tokenizer.save_pretrained(folder)
        if state.adapter is not None:
            save_adapter(self._model, state.adapter, folder / "adapter")
        if not any(folder.glob("*.safetensors")):
            raise OutputError(f"{folder} cannot be written: transformers has saved no weights")

    def _write(self, path: Path, state: StudentState) -> None:
        beside, before = path.with_name(f".{path.name}.part"), _before(path)
        try:
            _remove(beside)
            self.write_into(beside, state)
            sync_folder(beside)
            if path.exists():
                _remove(before)
                path.replace(before)
            beside.replace(path)
            _remove(before)
        except OSError as error:
            raise cannot_write(path, error) from error
        except OutputError:
            raise
        except Exception as error:  # of safetensors, of a model's own code
            raise OutputError(f"{path} cannot be written: {type(error).__name__}: {error}") from error
        finally:
            _put_back(path)
            _remove(beside)


def _before(path: Path) -> Path:
    """Where the folder that was at `path` is while another takes its place."""
    return path.with_name(f".{path.name}.before")


def _put_back(path: Path) -> None:
    """After an end between the two renames."""
    if _before(path).exists() and not path.exists():
        _before(path).replace(path)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
