"""The servers of a run as a Python script has them: `services.launch.servers_alone` in a process of its own.

A process between the script and its servers, because the script may have threads, a GPU and gigabytes of its own, which a
server's start must not copy; and because it outlives a script that is killed for as long as it takes to end the servers.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from services import errors
from services.config import RunConfig
from services.errors import DistillServeError, PeerError, StartupError
from services.launch.ranks import without_rank
from services.launch.role_starter import run_keys
from services.launch.script_screen import ScriptScreen

_COMMAND = [sys.executable, "-m", "services.launch.servers_alone"]
# Longer than a server has to end.
_END_S = 60.0
_LAST_WORDS_S = 2.0


class StartedServers:
    """Servers that another process of this script watches.

    Attributes:
        config: the run as the servers have it: with their ports and URLs.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", screen: ScriptScreen) -> None:
        self._process, self._screen = process, screen
        self._ready: Future[RunConfig] = Future()
        self._lost: Future[DistillServeError] = Future()
        self._tell: Callable[[BaseException], None] = lambda error: None
        self._is_over = False
        self._reader = threading.Thread(target=self._read, name="servers", daemon=True)
        self._reader.start()

    @property
    def config(self) -> RunConfig:
        return self._ready.result()

    def tell(self, fail: Callable[[BaseException], None]) -> None:
        """Tell `fail`, from another thread, when a server has ended by itself, or already has."""
        self._tell = fail
        if self._lost.done():
            fail(self._lost.result())

    def lost(self, patience_s: float = _LAST_WORDS_S) -> DistillServeError | None:
        """Why there are no servers any more: what fails for want of one may fail before its end is heard of."""
        with suppress(TimeoutError):
            return self._lost.result(patience_s)
        return None

    def begin(self, config: RunConfig) -> None:
        """Wait until all servers are ready.

        Raises:
            DistillServeError: as of `up`.
        """
        self._write(config.model_dump_json().encode() + b"\n")
        self._ready.result()

    def end(self) -> None:
        """Let the servers end, and wait until they have; a Ctrl-C meanwhile ends them at once.

        Raises:
            KeyboardInterrupt: there was one.
        """
        self._is_over = True
        self._write(b"e")
        try:
            self._wait()
        except BaseException:
            self._write(b"e")
            self._wait()
            raise
        finally:
            with suppress(OSError):
                self._stdin.close()
            self._reader.join(_LAST_WORDS_S)

    def _wait(self) -> None:
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the kernel then tells the servers to end
            self._process.wait()

    @property
    def _stdin(self) -> Any:
        assert self._process.stdin is not None
        return self._process.stdin

    def _write(self, content: bytes) -> None:
        with suppress(OSError):  # it has ended
            self._stdin.write(content)
            self._stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._take(line.decode(errors="replace").rstrip())
        self._lose(StartupError("the process that watches the servers was killed"))

    def _take(self, line: str) -> None:
        match _parse(line):
            case {"say": [str(), str(), str()] as arguments}:
                self._screen.say(*arguments)
            case {"stage": [str(), str(), str()] as arguments}:
                self._screen.stage(*arguments)
            case {"ready": dict() as config}:
                self._ready.set_result(RunConfig.model_validate(config, context={"role": "train"}))
            case {"failed": str() as why, "error": str() as name}:
                self._lose(getattr(errors, name, PeerError)(why))
            case _:
                self._screen.say(line)

    def _lose(self, error: DistillServeError) -> None:
        if self._is_over or self._lost.done():
            return
        self._lost.set_result(error)
        if self._ready.done():
            self._tell(error)
        else:
            self._ready.set_exception(error)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


@contextmanager
def started_servers(
    config: RunConfig, screen: ScriptScreen, environment: Mapping[str, str], command: list[str] = _COMMAND
) -> Iterator[StartedServers]:
    """The servers of a run, ready, for as long as the block runs; however it ends, and if this process is killed, they end.

    Inside the block the keys of the servers are in this process's environment.

    Args:
        environment: of the servers; that of this process may have been narrowed to its own GPUs.
        command: to which the id of this process is added.

    Raises:
        DistillServeError: as of `up`.
    """
    keys = run_keys()
    with variables(keys):
        process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**without_rank(environment), **keys},
            start_new_session=True,  # Ctrl-C is for the script alone
        )
        servers = StartedServers(process, screen)
        try:
            servers.begin(config)
            yield servers
        finally:
            servers.end()


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables of this process for as long as the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
