"""The logs of a run's processes: a file for each start of each of them, in the folder logs/ of the run.

rollout.log, rollout.2.log     first and second start of the rollout server, or of its run in this folder
rollout-2.log                  first start of the second rollout server
"""

import re
from collections import deque
from itertools import count
from pathlib import Path

from services.process.files import cannot_write

_TAIL_LINES = 500  # vLLM's processes pass an error on, each with its own traceback
_LONGEST_KEPT = 4000  # characters of a line in memory
_OURS = re.compile(r"(rollout|teacher|trainer)(-\d+)?(\.\d+)?\.log")


class RoleLog:
    """What one start of a role says, in a file, and its last lines in memory: a disk that is full must not hide why a run
    ended.

    Args:
        path: of the first start's; later ones get the next name that is free.

    Raises:
        OutputError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.problem: str | None = None
        """Why the file lacks what was said since."""
        try:
            path.parent.mkdir(exist_ok=True)
            self.path = next_log(path)
            self._file = self.path.open("wb", buffering=0)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def add(self, line: str) -> None:
        self.tail.append(line[:_LONGEST_KEPT])
        if self.problem is None:
            try:
                self._file.write(line.encode() + b"\n")
            except OSError as error:
                self.problem = error.strerror or str(error)

    def close(self) -> None:
        self._file.close()


def next_log(path: Path) -> Path:
    """The first name that is free: `path`, or rollout.2.log, rollout.3.log and so on in the place of rollout.log.

    Whoever asks holds the run's folder, so nobody else takes the name.
    """
    names = (path if number == 1 else path.with_suffix(f".{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())


def forget_logs(folder: Path) -> None:
    """Remove the logs of earlier runs, which one that replaces them begins anew.

    Raises:
        OutputError: one cannot be removed.
    """
    for path in folder.glob("*.log"):
        if _OURS.fullmatch(path.name):
            try:
                path.unlink()
            except OSError as error:
                raise cannot_write(path, error) from error
