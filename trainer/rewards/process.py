"""A reward worker as the trainer sees it: started afresh (no fork), asked over pipes, killed with all that it has started."""

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any, Self

from services.errors import ConfigError
from trainer.rewards.documents import decode, encode

# The interpreter's own path is replaced before anything but the standard library is imported.
_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from trainer.rewards.worker import main; main()"
_MARK = "DISTILLSERVE_REWARD_WORKER"
# Of one line with the rewards of a group.
_MOST_BYTES = 1 << 26
# For which a worker that has nothing to do is given time to end by itself.
_LEAVE_S = 2.0


def refuse_in_worker() -> None:
    """To be called where a run starts: a script with reward functions is imported by the workers of its own run.

    Raises:
        ConfigError: this process is a worker.
    """
    if _MARK in os.environ:
        raise ConfigError(
            "a script that holds reward functions is imported by the processes that call them, and starts a run there; put "
            'what starts it under `if __name__ == "__main__":`'
        )


class WorkerEndedError(Exception):
    """The process of a worker has ended; `str()` says how."""


class WorkerProcess:
    """One worker.

    Attributes:
        ready: of each of its functions what it is: `is_async`, `parameters`, `required`.
        importing: index of the function that it is importing, or imported last.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._num_calls = 0
        self._is_killed = False
        self.importing = 0
        self.ready: list[dict[str, Any]] = []

    @classmethod
    async def start(cls) -> Self:
        """A process that has not been told yet what to load."""
        path = [os.getcwd() if part == "" else part for part in sys.path]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", _PROGRAM, json.dumps(path), str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is the trainer's to handle; and what it starts can be killed with it
            limit=_MOST_BYTES,
            env=os.environ | {_MARK: "1", "PYTHONUNBUFFERED": "1"},
        )
        return cls(process)

    async def load(self, setup: dict[str, Any]) -> None:
        """Let it import or load.

        Raises:
            WorkerEndedError: it did not survive that.
            ValueError: it could not; `str()` says why.
        """
        await self._send(setup)
        while not self.ready:
            line = await self._read_line()
            if line is None:
                raise WorkerEndedError(await self._how_it_ended())
            self.importing = line.get("importing", self.importing)
            if "failed" in line:
                raise ValueError(line["failed"])
            self.ready = line.get("ready", [])
        self._reading = asyncio.create_task(self._read())

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return not self._is_killed and self._reading is not None and not self._reading.done()

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a call.

        Raises:
            WorkerEndedError: it ended instead.
            TypeError, ValueError: the arguments cannot be sent to another process.
        """
        assert self._reading is not None, "load comes first"
        self._num_calls += 1
        number = self._num_calls
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            await self._send(request | {"id": number})
            either: set[asyncio.Future[Any]] = {answer, self._reading}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise WorkerEndedError(await self._how_it_ended())
            return answer.result()
        finally:
            del self._calls[number]

    def kill(self) -> None:
        """End it, and all that it has started, at once."""
        self._is_killed = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Let it leave, or kill it; afterwards it is gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 0.0 if self._calls else _LEAVE_S)
        except TimeoutError:
            pass
        finally:
            self.kill()
            await self._process.wait()
            if self._reading is not None:
                self._reading.cancel()

    async def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        document = encode(request)
        with suppress(ConnectionError):  # what it has died of is heard of where its answer is waited for
            self._process.stdin.write(document)
            await self._process.stdin.drain()

    async def _read(self) -> None:
        while (line := await self._read_line()) is not None:
            if (answer := self._calls.get(line["id"])) is not None and not answer.done():
                answer.set_result(line)

    async def _read_line(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
            return decode(line) if line.endswith(b"\n") else None
        except ValueError:  # a function has written into our pipe, or a line that is far too long
            self.kill()
            return None

    async def _how_it_ended(self) -> str:
        """Its pipe is closed: it is ending, or is of no more use."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _LEAVE_S)
        code = self._process.returncode
        self.kill()
        if code is None:
            return "closed its pipe"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
