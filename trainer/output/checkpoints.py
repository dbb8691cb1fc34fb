"""The checkpoints of one run: made every few steps, written while the run goes on, the last few kept and the best one.

    main thread    copies to host memory ─► goes on                        waits before the next copy, and at the end
    other threads  ─► student, own part ─► parts of other ranks ─► name    of a folder only when all of it is on the disk

`trainer/checkpoint/folder.py` says what is in one.
"""

import logging
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from services.config import OutputConfig
from services.config.output_dir import complete_checkpoints
from services.errors import DistillServeError, OutputError
from services.process.files import cannot_write
from trainer.checkpoint import folder
from trainer.learner import Captured, Learner
from trainer.output.saving import SavedStudents

logger = logging.getLogger(__name__)


class Checkpoints:
    """Told when one is due; one at a time is written.

    Args:
        sync_rows: waits until the rows of the steps so far are on the disk.
        finished_step: after which the run goes on.
        reverse_kls: what evaluations of those that are there have measured, by their steps.
    """

    def __init__(
        self,
        output: OutputConfig,
        learner: Learner,
        students: SavedStudents,
        sync_rows: Callable[[], None],
        *,
        finished_step: int = 0,
        reverse_kls: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        self._folder, self._every = Path(output.dir) / "checkpoints", output.save_every_steps
        self._limit, self._keeps_best = output.save_total_limit, output.keep_best
        self._learner, self._students, self._sync_rows = learner, students, sync_rows
        self._reverse_kls = dict(reverse_kls)
        self._last = finished_step  # the newest one that is there, or is being written
        self._steps = [step for step in complete_checkpoints(Path(output.dir)) if 0 < step <= finished_step]
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def are_made(self) -> bool:
        """Whether the run makes any by itself."""
        return self._every > 0

    @property
    def newest(self) -> Path | None:
        """The newest one that is complete."""
        return self._path(self._steps[-1]) if self._steps else None

    def rehearse(self) -> None:
        """Find out before the first step whether the other ranks write where this one looks.

        Raises:
            OutputError: the folder cannot be written, or they do not share it.
            RankLostError: a rank is gone.
        """
        if not self.are_made or self._learner.ranks.count == 1:
            return
        path = self._path(0)
        try:
            self._learner.rehearse_parts(folder.begin(path))
            folder.check_parts(path, range(1, self._learner.ranks.count))
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            folder.remove(folder.folder_beside(path))

    def begin(self) -> None:
        """Remove what was not completed, and checkpoints of steps that are to be done again. Those of an earlier run, which this one
        does not go on from, are students only from now on, until a newer student takes their place.

        Raises:
            OutputError: one cannot be removed.
        """
        try:
            for path in self._folder.glob(".step-*.part"):
                folder.remove(path)
            for step, path in complete_checkpoints(self._folder.parent).items():
                if self._last and step > self._last:
                    folder.remove(path)
                elif not self._last:
                    folder.make_incomplete(path)
        except OSError as error:
            raise cannot_write(path, error) from error

    def is_due(self, step: int) -> bool:
        """Whether a step is one of every so many."""
        return self.are_made and step % self._every == 0

    def make(self, step: int, state: Mapping[str, Any]) -> Path:
        """Copy the learner as it is and have it written; one that is there already is left as it is.

        Args:
            step: the learner's last.
            state: what else the run goes on with.

        Returns:
            the checkpoint's folder, which is there after `wait`.

        Raises:
            OutputError: it, or the one before, cannot be written.
            ConfigError: the user's optimizer has a state that cannot be kept.
        """
        self.wait()
        path = self._path(step)
        if self._last == step and step in self._steps:
            return path
        try:
            beside = folder.begin(path)
        except OSError as error:
            folder.remove(folder.folder_beside(path))
            raise cannot_write(path, error) from error
        captured = self._learner.capture(beside)
        self._last, self._error = step, None
        arguments = (path, captured, {"step": step, **state})
        # Not waited for by an interpreter that ends: whatever is not complete is not looked at.
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        return path

    def wait(self) -> None:
        """Until what is being written is complete.

        Raises:
            OutputError: it cannot be written; those before it are as they were.
            RankLostError: a rank that had a part of it is gone.
        """
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """As `wait`, of one that has ended by now."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread = None
        if (error := self._error) is not None:
            raise error

    def evaluated(self, step: int, reverse_kl: float) -> bool:
        """The student of a step was measured; returns whether its checkpoint is to be made, for it is the best so far."""
        lowest = min(self._reverse_kls.values(), default=math.inf)
        if not self._keeps_best or step == 0 or not reverse_kl < lowest:
            return False
        self._reverse_kls[step] = reverse_kl
        logger.info("step %d is the best so far, with a held-out reverse KL of %.4f", step, reverse_kl)
        return True

    def _write(self, path: Path, captured: Captured, state: Mapping[str, Any]) -> None:
        beside = folder.folder_beside(path)
        try:
            self._students.write_into(beside, captured.student)
            folder.write_part(beside, 0, captured.state.tensors, captured.state.blocks)
            self._learner.wait_for_parts(beside)
            self._sync_rows()
            folder.complete(path, self._learner.ranks.count, {**state, "learner": captured.state.values})
            self._steps.append(state["step"])
            self._prune()
        except DistillServeError as error:
            self._error = error
        except OSError as error:
            self._error = cannot_write(path, error)
        except Exception as error:  # of safetensors, of a model's own code
            self._error = OutputError(f"{path} cannot be written: {type(error).__name__}: {error}")
        finally:
            if self._error is not None:
                self._error.__traceback__ = None  # which holds the copies
                folder.remove(beside)

    def _prune(self) -> None:
        """Remove the oldest ones, after a newer one is complete. One that cannot be removed stays, and is not tried again."""
        measured = [step for step in self._steps if step in self._reverse_kls] if self._keeps_best else []
        best = min(measured, key=self._reverse_kls.__getitem__, default=None)
        for step in self._steps[: -self._limit]:
            if step == best:
                continue
            self._steps.remove(step)
            try:
                folder.remove(self._path(step))
            except OSError as error:
                logger.warning("%s stays, it cannot be removed: %s", self._path(step), error.strerror)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}"
