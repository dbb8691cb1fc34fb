"""The process that `distillserve rollout` becomes: vLLM's own server, whose end takes a bounded time.

    a first SIGTERM or SIGINT     vLLM ends its engine and the server; what is left after GRACE_S is killed
    a second SIGINT               everything is killed at once
    this process is killed        the kernel kills the processes that vLLM started for it, and theirs

vLLM alone waits for the end of open requests, which may never come, and does not listen to a second signal.
"""

import atexit
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from services.errors import ERROR_PREFIX
from services.process.parent import end_with_parent
from services.process.signals import Interrupted, handling

GRACE_S = 10.0
"""From the first signal to the end of everything, seconds."""
# Of it, what the engine has to end its workers.
_ENGINE_S = 7
# How long requests may take to notice that the engine is gone, within that time; vLLM's setting takes whole seconds.
_REQUESTS_S = 1
# The process that starts others, for those: when it has ended before they could ask for it, somebody else is their parent.
_PARENT = "DISTILLSERVE_ROLLOUT_PROCESS"


class Ending:
    """What signals do to the server.

    Args:
        kill: ends this process at once, with all that it started.
    """

    def __init__(self, kill: Callable[[int], object]) -> None:
        self._kill = kill
        self._is_ending = False
        self.end_server: Callable[[], object] | None = None
        """Begins vLLM's own end, once it serves."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM and SIGINT.

        Raises:
            Interrupted: the server is still starting.
        """
        if self._is_ending:
            if number == signal.SIGINT:
                self._kill(number)
            return
        self._is_ending = True
        late = threading.Timer(GRACE_S, self._kill, (number,))
        late.daemon = True
        late.start()
        if self.end_server is None:
            raise Interrupted(number)
        self.end_server()


def _kill_everything(number: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)


def _unlink_shared_memory() -> None:
    """Remove the names of the memory that workers on a CPU share; they have it open, and those that are killed leave it."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(OSError):  # one that has just ended, such as a compiler
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                if "-cpushm_" in line:
                    Path(line.split(maxsplit=5)[5]).unlink(missing_ok=True)


def _leave(code: int) -> None:
    """End without the interpreter's own end, at which libraries list by the dozen what they did not release."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_parent_and_be_one() -> None:
    """In a process that vLLM has started: the kernel kills it when the one that started it has ended."""
    end_with_parent(int(os.environ[_PARENT]), signal.SIGKILL)
    os.environ[_PARENT] = str(os.getpid())


def _end_as_forks_do() -> None:
    """In a process that was spawned: leave out the interpreter's own end, in which vLLM's workers look for garbage for seconds,
    until they are killed."""
    bootstrap = BaseProcess._bootstrap  # type: ignore[attr-defined]

    def run(process: BaseProcess, parent_sentinel: int) -> None:
        os._exit(bootstrap(process, parent_sentinel))

    BaseProcess._bootstrap = run  # type: ignore[attr-defined]


# Of the two ways in which multiprocessing starts a process: a fork calls this first ...
multiprocessing.util.register_after_fork(end_with_parent_and_be_one, lambda work: work())
# ... and what is spawned imports this module, before it imports vLLM, which takes seconds.
if __name__ == "__mp_main__":
    end_with_parent_and_be_one()
    _end_as_forks_do()


def main() -> int:
    """Serve what the command line says, in vLLM's words, until a signal comes.

    Returns:
        0, or 128 + the number of a signal that came before the server listened.
    """
    os.environ[_PARENT] = str(os.getpid())
    ending = Ending(_kill_everything)
    try:
        with handling(ending.handle, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            _serve(ending)
    except Interrupted as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return 128 + error.number
    return 0


def _serve(ending: Ending) -> None:
    """vLLM's own main, except for signals, for how long its engine may take to end, and for what uvicorn is told."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.system_utils import decorate_logs

    from services.http.bounded_connection import BoundedConnection
    from services.rollout.settings import RolloutSettings

    class Connection(BoundedConnection):
        transfer_timeout_s = RolloutSettings.from_environment().transfer_timeout_s

    class Loop(uvloop.Loop):
        """Leaves signals to `ending`, which tells vLLM."""

        def add_signal_handler(self, sig: int, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
            ending.end_server = partial(self.call_soon_threadsafe, callback, *args)

    async def serve() -> None:
        address, listener = setup_server(arguments, reuse_port=False)
        async with build_async_engine_client(arguments) as engine:
            # The engine has a copy of its own, whose 0 lets it abort what it works on. This one is how long it may take to
            # end its workers; at 0 all are killed, and leave shared memory behind.
            engine.vllm_config.shutdown_timeout = _ENGINE_S
            if sys.platform == "linux":
                _unlink_shared_memory()
            closing = await build_and_serve(
                engine, address, listener, arguments, http=Connection, timeout_graceful_shutdown=_REQUESTS_S
            )
        await closing

    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args()
    configure_logging_from_args(arguments)
    validate_parsed_serve_args(arguments)
    decorate_logs("APIServer", skip_if_decorated=True)
    uvloop.run(serve(), loop_factory=Loop)


if __name__ == "__main__":
    _leave(main())
