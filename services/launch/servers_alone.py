"""The servers of `up` without its trainer, for a Python script that trains in its own process (trainer/distillation_trainer.py).

    python -m services.launch.servers_alone PARENT

stdin    the run as a line of JSON. It stays open as long as the servers are wanted: a byte, or its end, which comes when
         the script ends, however it ends, ends them; a second byte ends them at once.
stdout   what happens, a line of JSON each: `say` and `stage` for the script's screen, `ready` with the run as the servers
         have it, `failed` with why there are none. A line that is no JSON is to be shown as it is.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from rich.table import Table

from services.config import RunConfig
from services.errors import ConfigError, DistillServeError, PeerError
from services.launch.panel import Stage
from services.launch.preparation import check_start, prepare, wanted_ports
from services.launch.role_starter import Command, role_command
from services.launch.screen import Screen
from services.launch.supervisor import Supervisor
from services.process.parent import end_with_parent

_STDIN = 0
_GRACE_S = 20.0


def send(**message: Any) -> None:
    """A line for the script; without a reader nobody needs it."""
    try:
        print(json.dumps(message), flush=True)
    except OSError:
        logging.getLogger(__name__).debug("the script is gone")


class _Messages(Screen):
    """A screen that is elsewhere."""

    @property
    def has_panel(self) -> bool:
        return False

    def say(self, message: str, role: str = "up", style: str = "") -> None:
        send(say=[message, role, style])

    def stage(self, role: str, doing: str, more: str = "") -> None:
        self.stages[role] = Stage(doing)
        send(stage=[role, doing, more])

    def table(self, table: Table) -> None:
        """The script's trainer shows the results itself."""

    async def run(self) -> None:
        await asyncio.Event().wait()


class ServersAlone(Supervisor):
    """Starts, watches and ends the servers of a run whose trainer is the process at the other end of stdin."""

    async def serve(self, ports: dict[str, int]) -> None:
        """Until they are not wanted any more, or one of them ends.

        Raises:
            PeerError: a server has ended by itself, or a signal came.
            StartupError: a server cannot be started, or is not ready in time.
        """
        loop = asyncio.get_running_loop()
        loop.add_reader(_STDIN, self._hear)
        try:
            code = await self.run(ports)
        finally:
            loop.remove_reader(_STDIN)
        if code:
            raise PeerError(self._why or f"the servers were ended by {signal.Signals(code - 128).name}")

    def _hear(self) -> None:
        has_ended = not os.read(_STDIN, 1)
        if not self._interrupted.done():
            self._interrupted.set_result(0)
        elif not has_ended:
            self._ending.hurry()
        if has_ended:
            asyncio.get_running_loop().remove_reader(_STDIN)

    async def _train(self) -> int:
        send(ready=self._config.model_dump(mode="json"))
        code = await self._first(None)
        assert code is not None
        return code

    def _show_results(self) -> None:
        """The trainer has done so."""


def serve(config: RunConfig, command: Command = role_command, grace_s: float = _GRACE_S) -> None:
    """Run the servers of a run until stdin says otherwise.

    Args:
        grace_s: how long a server that is asked to end may take before it is killed, seconds.

    Raises:
        ConfigError: the run asks for a trainer that is started again.
        DistillServeError: as of `up`, and PeerError when a server has ended by itself.
    """
    if config.up.restart_trainer:
        raise ConfigError(
            f"up.restart_trainer = {config.up.restart_trainer} would be ignored: the trainer is the program that starts these "
            "servers; leave it out, and start the program again"
        )
    check_start(config)
    with ExitStack() as stack:
        moved, folder, servers = prepare(config, stack)
        screen = _Messages(verbose=False, metrics=folder.path / "metrics.jsonl", on_reader_gone=lambda: None)

        async def supervise() -> None:
            alone = ServersAlone(moved, servers, folder, None, command, grace_s, False, screen)
            await alone.serve(wanted_ports(config))

        asyncio.run(supervise())


def main(serve: Callable[[RunConfig], None] = serve) -> int:
    """Of the process: serve the run of the first line of stdin; returns the exit code."""
    end_with_parent(int(sys.argv[1]), signal.SIGTERM)
    try:
        serve(RunConfig.model_validate_json(_first_line(), context={"role": "up"}))
    except DistillServeError as error:
        send(failed=str(error), error=type(error).__name__)
        return error.exit_code
    return 0


def _first_line() -> bytes:
    """Byte by byte: a buffered reader would swallow what comes after."""
    line = bytearray()
    while (byte := os.read(_STDIN, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


if __name__ == "__main__":
    sys.exit(main())
