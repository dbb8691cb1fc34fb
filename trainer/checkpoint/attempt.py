"""A process that works on a run: the first one, or one that goes on after another has ended."""

import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from services.process.files import append_line, sync_file, write_by_rename
from trainer.checkpoint.folder import Checkpoint
from trainer.checkpoint.journal import NAME, attempt_row, read_journal


def _new_run() -> str:
    return uuid.uuid4().hex[:8]


def _new_process() -> str:
    return uuid.uuid4().hex[:4]


@dataclass(frozen=True)
class Attempt:
    """Which process of which run this is.

    Attributes:
        run: id of the run, the same in all attempts.
        number: 1, 2, ...
        finished_step: after which it goes on; 0: the run begins.
        wall_s: that earlier attempts have worked up to that step.
        process: which of the processes that believe to be this attempt, for a folder may have been copied.
    """

    run: str = field(default_factory=_new_run)
    number: int = 1
    finished_step: int = 0
    wall_s: float = 0.0
    process: str = field(default_factory=_new_process)

    @property
    def holder(self) -> str:
        """What rollout servers know it as: tokens that were sampled for another attempt are none of its own."""
        return f"{self.run}-{self.number}_{self.process}"

    @property
    def row(self) -> bytes:
        """Its line in the journal."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return attempt_row(self.run, self.number, self.finished_step, now)

    def announce(self, folder: Path) -> None:
        """Write down that it goes on, before a server hears of it: the next attempt must have a higher number.

        Raises:
            OutputError: the journal cannot be written.
        """
        path = folder / NAME
        written = path.read_bytes() if path.exists() else b""
        if not written.endswith(b"\n") and written:  # a power cut: what is not a line yet must not become half of one
            write_by_rename(path, written[: written.rfind(b"\n") + 1])
        append_line(path, self.row)
        sync_file(path)


def next_attempt(checkpoint: Checkpoint) -> Attempt:
    """The attempt that goes on from a checkpoint.

    Raises:
        StartupError: the journal beside it is not there, is of another run, or lacks a step.
    """
    state, journal = checkpoint.state, read_journal(checkpoint.path.parents[1])
    journal.check(state["run"], checkpoint.step, positions=state["positions"])
    numbers = (int(row["attempt"]) for row in journal.attempts if row.get("run") == state["run"])
    number = 1 + max((state["attempt"], *numbers))
    return Attempt(state["run"], number, checkpoint.step, state["wall_s"])
