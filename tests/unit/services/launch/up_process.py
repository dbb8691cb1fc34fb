"""`up` as a process of its own whose roles, small scripts, die in many ways."""

import os
import signal
from pathlib import Path
from typing import Any

from services.config import RunConfig
from services.gpus.advice import updated
from tests.unit.services.launch.roles import start_up, starts, until, wait_until_nobody_lives

KILLED = "was ended by SIGKILL, which this run did not send: the kernel does so when memory runs out (see `dmesg`)"
_PATIENCE_S = 50.0  # less than a pause of 60 s
SAVES = """
def save(*_): touch("saved"); sys.exit(143)
signal.signal(signal.SIGTERM, save)
wait_for("enough")
"""


def quick(config: RunConfig, **options: Any) -> RunConfig:
    return updated(config, "up", **{"restart_backoff_s": 0.1, **options})


class Up:
    """`up` as a process of its own, once its trainer trains.

    Args:
        acts: what roles do, as of `Restarted`.
    """

    def __init__(self, config: RunConfig, folder: Path, acts: dict[str, dict[int, str]] | None = None) -> None:
        self.folder = folder
        with (folder / "up.txt").open("wb") as output:
            self.process = start_up(config, f"Restarted(folder, {acts!r})", folder, stdout=output, stderr=output)
        for _ in until(_PATIENCE_S):
            if starts(folder, "trainer-0"):
                break
            assert self.process.poll() is None, self.lines()

    def lines(self) -> list[str]:
        return (self.folder / "up.txt").read_text().splitlines()

    def wait_until_said(self, words: str, times: int = 1) -> None:
        for _ in until(_PATIENCE_S):
            if sum(words in line for line in self.lines()) >= times:
                return
            assert self.process.poll() is None, self.lines()

    def kill(self, name: str) -> None:
        """Kill the last start of a role."""
        os.kill(starts(self.folder, name)[-1][0], signal.SIGKILL)

    def wait_until_started(self, name: str, times: int) -> None:
        for _ in until(_PATIENCE_S):
            if len(starts(self.folder, name)) >= times:
                return

    def finish(self) -> int:
        """Let the trainer be done; returns the exit code."""
        (self.folder / "enough").touch()
        return self.end()

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Press Ctrl-C, and see the end."""
        os.kill(self.process.pid, number)
        assert self.end() == 128 + number

    def end(self) -> int:
        code = self.process.wait(_PATIENCE_S)
        wait_until_nobody_lives(self.folder)
        assert "Traceback" not in "\n".join(self.lines()) and "never retrieved" not in "\n".join(self.lines())
        return code


def logs(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "out" / "logs").iterdir())
