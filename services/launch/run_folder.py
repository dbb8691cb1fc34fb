"""The folder of a run as `up` sees it: the run files in it, and how far the trainer is, from what it has written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from services.config import RunConfig
from services.config.output_dir import COMPLETE, RESUME
from services.process.files import write_by_rename


class RunFolder:
    """The folder of a run, with the run as its roles read it.

    Args:
        run_file: written before anything of this run starts; what is older is of an earlier run in the same folder.
    """

    def __init__(self, path: Path, run_file: Path) -> None:
        self.path, self.run_file = path, run_file

    def has_begun(self) -> bool:
        """Whether the trainer trains: it writes config.json when every check has passed."""
        return self.is_ours(self.path / "config.json")

    def has_checkpoint(self) -> bool:
        """Whether the trainer has written what it can go on from: the file that it puts last into a checkpoint is there."""
        return any(map(self.is_ours, self.path.glob(f"checkpoints/step-*/{RESUME}/{COMPLETE}")))

    def is_saving(self) -> bool:
        """Whether the trainer is writing a student, as trainer/output/saving.py names what is not whole yet."""
        parts = (self.path / ".student.part", *self.path.glob("checkpoints/.*.part"))
        return any(map(self.is_ours, parts))

    def is_ours(self, path: Path) -> bool:
        """Whether this run has written something."""
        try:
            return path.stat().st_mtime_ns >= self.run_file.stat().st_mtime_ns
        except OSError:  # not there yet, or somebody has removed the folder
            return False


@contextmanager
def run_folder(path: Path, config: RunConfig) -> Iterator[RunFolder]:
    """The folder, with a run file that becomes its run.json, unless that is of an earlier run which this one has not
    replaced."""
    ours, final = path / f".run.{os.getpid()}.json", path / "run.json"
    with written(ours, config):
        folder = RunFolder(path, ours)
        try:
            yield folder
        finally:
            with suppress(OSError):  # somebody has removed the folder meanwhile; how the run ended counts
                if not final.exists() or folder.has_begun():
                    ours.replace(final)


@contextmanager
def written(path: Path, config: RunConfig) -> Iterator[Path]:
    """A file with a run, for as long as the block runs."""
    write_by_rename(path, (config.model_dump_json(indent=2) + "\n").encode())
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
