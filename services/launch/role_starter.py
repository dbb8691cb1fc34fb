"""How the processes of a run are started: what all of them share, and the environment of each."""

import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from services.config.keys import Secrets, make_key, reveal
from services.http.guard import LAUNCH_VARIABLE
from services.launch.ranks import with_rank, without_rank
from services.launch.role_log import RoleLog
from services.launch.role_process import OnLine, RoleId, RoleProcess
from services.launch.run_folder import RunFolder
from services.process.folder_lock import FolderLock

Command = Callable[[str, Path], list[str]]
"""Role and run file to an argument vector; tests put small scripts in place of the real roles."""

RESUME = ("--resume", "--output.overwrite", "false", "--output.resume_step", "null")
"""Added to the trainer's command when it is to go on from its newest checkpoint, whatever the run was started with."""

# OpenMP threads that spin while they wait for work take the cores from the role whose turn it is: on two cores
# this alone made scoring eight times slower (both names: GNU's and Intel's runtime).
_SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def role_command(role: str, run_file: Path) -> list[str]:
    """The command line of a role."""
    subcommand = "train" if role == "trainer" else role
    return [sys.executable, "-m", "services.cli", subcommand, str(run_file)]


class RoleStarter:
    """Starts processes of one run, all with the same keys; each start writes a log of its own.

    Args:
        lock: of the run's folder, shared with the trainer; None where that is started by others.
        on_line: told of every line that a process says.
    """

    def __init__(self, folder: RunFolder, lock: FolderLock | None, command: Command, on_line: OnLine) -> None:
        self._folder, self._lock, self._command, self._on_line = folder, lock, command, on_line
        self.launch = secrets.token_hex(16)
        """What servers of this run answer with on /ready."""
        self._keys = run_keys()

    async def server(self, role: RoleId, run_file: Path) -> RoleProcess:
        """Start a server.

        Raises:
            StartupError: the system has no room for another process.
            OutputError: its log cannot be made.
        """
        return await self._start(role, self._command(role.role, run_file), self._environment(), ())

    async def rank(self, role: RoleId, master_port: int, *, resume: bool) -> RoleProcess:
        """Start a rank of the trainer.

        Args:
            master_port: at which the ranks find each other.
            resume: go on from the newest checkpoint that this run has written.

        Raises:
            StartupError, OutputError: as of `server`.
        """
        # The trainer alone writes into the folder. What a server may leave behind when `up` is killed must not hold it.
        assert self._lock is not None
        environment = with_rank(self._environment() | self._lock.environment(), role.number, role.count, master_port)
        command = [*self._command(role.role, self._folder.run_file), *(RESUME if resume else ())]
        return await self._start(role, command, environment, (self._lock.descriptor,))

    def _environment(self) -> dict[str, str]:
        return {**_SHARED_CORES, **without_rank(os.environ), **self._keys, LAUNCH_VARIABLE: self.launch}

    async def _start(
        self, role: RoleId, command: list[str], environment: Mapping[str, str], pass_fds: tuple[int, ...]
    ) -> RoleProcess:
        log = RoleLog(self._folder.path / "logs" / role.log_name)
        return await RoleProcess.start(role, command, environment, log, self._on_line, pass_fds=pass_fds)


def run_keys() -> dict[str, str]:
    """Environment variables with the keys of a run's servers, random where the environment names none: other users of this
    machine, and web pages, reach its loopback too."""
    given = Secrets()
    keys = {"DISTILLSERVE_ROLLOUT_KEY": given.rollout_key, "DISTILLSERVE_TEACHER_KEY": given.teacher_key}
    variables = {name: reveal(key) or make_key() for name, key in keys.items()}
    return variables | {f"{name}_FILE": "" for name in keys}
