"""One role as a child of `distillserve up`: its process, its log file, its end.

Each child leads a session of its own, so that Ctrl-C reaches only `up` and whatever a role leaves behind can be ended with it.
To end it, its leader is signalled alone: vLLM ends its own workers then, in order. A signal to all of them at once makes it
kill them, with shared memory left behind.
"""

import asyncio
import os
import signal
import time
from asyncio.subprocess import SubprocessStreamProtocol
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Self

from services.errors import StartupError
from services.launch.role_log import RoleLog
from services.process.parent import end_with_parent

_LONGEST_LINE = 1 << 20

OnLine = Callable[[str, str], None]
"""Told of every line: the name of who said it, and what."""


@dataclass(frozen=True)
class RoleId:
    """Which of a run's processes one is."""

    role: str
    """"rollout", "teacher" or "trainer"."""
    number: int = 0
    """Among the `count` processes of this role; of the trainer the rank."""
    count: int = 1

    @property
    def trains(self) -> bool:
        """Whether it is a rank of the trainer."""
        return self.role == "trainer"

    @property
    def leads(self) -> bool:
        """Whether it is rank 0, which says how the run ends."""
        return self.trains and self.number == 0

    @property
    def name(self) -> str:
        """What its lines and its log are called: "rollout", "rollout 2", "trainer", "trainer rank 1"."""
        if self.number == 0:
            return self.role
        return f"trainer rank {self.number}" if self.trains else f"{self.role} {self.number + 1}"

    @property
    def title(self) -> str:
        """What sentences call it, after "the": "rollout", "rollout server 1", "trainer's rank 1"."""
        if self.count == 1:
            return self.role
        return f"trainer's rank {self.number}" if self.trains else f"{self.role} server {self.number + 1}"

    @property
    def log_name(self) -> str:
        """The file of its first start's log."""
        return self.name.replace(" rank", "").replace(" ", "-") + ".log"


class _Protocol(SubprocessStreamProtocol):
    """Knows when the process has ended.

    Process.wait() waits for the pipe as well (python/cpython#119710), which a process that the role left behind, a
    tracker's or vLLM's engine, may hold open for ever.
    """

    def __init__(self) -> None:
        super().__init__(_LONGEST_LINE, asyncio.get_running_loop())
        self.ended = asyncio.Event()
        self.ended_at = 0.0

    def process_exited(self) -> None:
        super().process_exited()
        self.ended_at = time.monotonic()
        self.ended.set()


class RoleProcess:
    """A role that runs.

    Args:
        log: receives every line of its output; of a progress bar, the last state.
        on_line: told of every line as well.
    """

    def __init__(
        self, role: RoleId, process: asyncio.subprocess.Process, protocol: _Protocol, log: RoleLog, on_line: OnLine
    ) -> None:
        self.id, self.process, self.log = role, process, log
        self._protocol = protocol
        self._reader = asyncio.create_task(self._relay(on_line))

    @classmethod
    async def start(
        cls,
        role: RoleId,
        command: list[str],
        environment: Mapping[str, str],
        log: RoleLog,
        on_line: OnLine,
        pass_fds: tuple[int, ...] = (),
    ) -> Self:
        """Start it.

        Raises:
            StartupError: the system has no room for another process.
        """
        loop = asyncio.get_running_loop()
        try:
            transport, protocol = await loop.subprocess_exec(
                _Protocol,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**environment, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                # SIGTERM: a role that trains saves its student, a server ends what it started.
                preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
                pass_fds=pass_fds,
            )
        except BaseException as error:  # also of a start that is given up, whose process asyncio kills
            log.close()
            if not isinstance(error, OSError):
                raise
            raise StartupError(
                f"the {role.title} cannot be started: {error.strerror or error}; raise this user's limit of processes or open "
                "files (`ulimit -a`), or end other programs"
            ) from error
        return cls(role, asyncio.subprocess.Process(transport, protocol, loop), protocol, log, on_line)

    @property
    def is_running(self) -> bool:
        return not self._protocol.ended.is_set()

    @property
    def ended_at(self) -> float:
        """When it ended; monotonic, seconds."""
        return self._protocol.ended_at

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        await self._protocol.ended.wait()
        code = self.process.returncode
        assert code is not None
        return code

    async def last_words(self, patience_s: float) -> None:
        """Read what it said before its end is told; the pipe may stay open, so not for ever."""
        await asyncio.wait([self._reader], timeout=patience_s)

    def signal(self, number: int) -> None:
        """To the role's own process, which passes it on to what it started."""
        if self.is_running:
            self.process.send_signal(number)

    async def kill(self) -> None:
        """End at once what is left of its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.wait()

    def close(self) -> None:
        self._reader.cancel()
        self.log.close()

    async def _relay(self, on_line: OnLine) -> None:
        assert self.process.stdout is not None
        while line := await _read_line(self.process.stdout):
            text = line.decode(errors="replace").rstrip().rsplit("\r", 1)[-1]
            if text:
                self.log.add(text)
                on_line(self.id.name, text)


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:  # a line beyond the limit: show that there was one
        return b"(a very long line was left out)\n"
