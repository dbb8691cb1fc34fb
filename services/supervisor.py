"""`distillserve up`: the three roles as processes of this machine, started, watched and ended together.

    starts     rollout and teacher (one after the other when they share a GPU: vLLM asserts when another
               process frees memory while it measures), waits until both are ready, then the trainer
    ends       all of them when the trainer is done, when any of them dies, or on Ctrl-C

honcho and circus were considered: honcho starts everything at once and cannot wait for readiness, circus
brings a daemon with sockets of its own. What is needed beyond asyncio's subprocesses is little: each child
leads a session of its own, so that vLLM's engine processes end with it and Ctrl-C reaches only us.
"""

import asyncio
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live
from rich.text import Text

from services.config import RunConfig, ServerSection, check_output_dir
from services.errors import ConfigError, StartupError
from services.files import write_by_rename
from services.gpu_sharing import servers_share_a_gpu
from services.panel import last_step, render
from services.startup import check_model_folder, check_output_room, free_port

Command = Callable[[str, Path], list[str]]
"""Role and run file to an argument vector; tests put small scripts in place of the real roles."""

_COLOURS = {"rollout": "cyan", "teacher": "magenta", "trainer": "green"}
# OpenMP threads that spin while they wait for work take the cores from the role whose turn it is: on two cores
# this alone made scoring eight times slower (both names: GNU's and Intel's runtime).
_SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
_GRACE_S = 20.0
# The trainer saves the student first, which for billions of parameters takes minutes on a slow disk.
_SAVING_GRACE_S = 600.0
_POLL_S = 0.25
_LAST_WORDS_S = 1.0
_PR_SET_PDEATHSIG = 1


def role_command(role: str, run_file: Path) -> list[str]:
    """The command line of a role."""
    subcommand = "train" if role == "trainer" else role
    return [sys.executable, "-m", "services.cli", subcommand, str(run_file)]


def up(config: RunConfig, command: Command = role_command, grace_s: float = _GRACE_S) -> int:
    """Run all three roles; returns the exit code of the whole.

    Args:
        grace_s: how long a server that is asked to end may take before it is killed, seconds.

    Raises:
        ConfigError: the run names servers that somebody else starts, or its folder holds an earlier run.
        StartupError: a model folder is missing, or the output folder cannot be used.
    """
    check_model_folder("student.model", config.student.model or "")
    check_model_folder("teacher.model", config.teacher.model or "")
    output_dir = check_output_dir(config)
    check_output_room(output_dir)
    config = without_access_log(with_free_ports(config))
    with _run_file(output_dir, config) as run_file:
        return asyncio.run(Supervisor(config, run_file, command, grace_s).run())


@contextmanager
def _run_file(output_dir: Path, config: RunConfig) -> Iterator[Path]:
    """The run as the roles read it. It becomes the folder's run.json, unless that is of an earlier run which this one
    has not replaced: its trainer writes config.json once every check has passed."""
    ours, final, began = output_dir / f".run.{os.getpid()}.json", output_dir / "run.json", output_dir / "config.json"
    write_by_rename(ours, (config.model_dump_json(indent=2) + "\n").encode())
    started_ns = ours.stat().st_mtime_ns
    try:
        yield ours
    finally:
        if not final.exists() or (began.exists() and began.stat().st_mtime_ns >= started_ns):
            ours.replace(final)
        ours.unlink(missing_ok=True)


def with_free_ports(config: RunConfig) -> RunConfig:
    """The same run on ports that are free now, with URLs that name them.

    Raises:
        ConfigError: the run names servers that `up` would not use.
    """
    for name in ("rollout", "teacher"):
        _refuse_urls(name, getattr(config, name))
    if config.teacher.protocol == "vllm":
        raise ConfigError(
            "teacher.protocol = vllm is for servers that others start, but `distillserve up` starts its own teacher; "
            "leave it out (teacher.engine = vllm runs that teacher in vLLM), or attach with `distillserve train`"
        )
    rollout_port = free_port(config.rollout.host, config.rollout.port)
    teacher_port = free_port(config.teacher.host, config.teacher.port, frozenset({rollout_port}))
    sections = {}
    for name, port in (("rollout", rollout_port), ("teacher", teacher_port)):
        section = getattr(config, name)
        if port != section.port:
            print(f"{name}.port = {section.port} is in use, taking {port}")
        moved = section.model_copy(update={"port": port, "urls": []})
        sections[name] = moved.model_copy(update={"urls": moved.server_urls()})
    return config.model_copy(update=sections)


def without_access_log(config: RunConfig) -> RunConfig:
    """The same run, whose own requests to the teacher are not worth a line each, unless it asks for them."""
    if "access_log" in config.teacher.model_fields_set:
        return config
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"access_log": False})})


def _refuse_urls(name: str, section: ServerSection) -> None:
    # A run.json that `up` wrote names its own servers; that is no contradiction.
    if section.urls and section.server_urls() != section.model_copy(update={"urls": []}).server_urls():
        raise ConfigError(
            f"{name}.urls = {section.urls} names servers that run elsewhere, but `distillserve up` starts its own; "
            f"leave {name}.urls out, or attach with `distillserve train`"
        )


@dataclass
class Child:
    """A role's process and the task that shows what it says."""

    role: str
    process: asyncio.subprocess.Process
    reader: asyncio.Task[None] | None = None

    async def wait(self) -> int:
        """Its exit code, once it has ended.

        Not process.wait(): that waits for the pipe as well (python/cpython#119710), which a process that the role
        left behind, a tracker's or vLLM's engine, may hold open for ever.
        """
        while (code := self.process.returncode) is None:
            await asyncio.sleep(_POLL_S)
        return code

    async def last_words(self, patience_s: float) -> None:
        """Let what it said appear before what is said about it; the pipe may stay open, so not for ever."""
        if self.reader is not None:
            await asyncio.wait([self.reader], timeout=patience_s)

    def signal(self, number: int) -> None:
        """To the whole session: vLLM's engine processes are in it."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return


class Supervisor:
    def __init__(self, config: RunConfig, run_file: Path, command: Command, grace_s: float) -> None:
        self._config, self._run_file, self._command, self._grace_s = config, run_file, command, grace_s
        self._console = Console(highlight=False)
        self._children: dict[str, Child] = {}
        self._status: dict[str, str] = {}
        self._interrupted: asyncio.Future[int]
        self._hurried: asyncio.Future[None]  # by a second Ctrl-C
        self._started = time.time()

    async def run(self) -> int:
        """Start, watch, end. Returns 0, the exit code of the role that failed, or 128 + the signal's number."""
        loop = asyncio.get_running_loop()
        self._interrupted, self._hurried = loop.create_future(), loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
                loop.add_signal_handler(number, self._interrupt, number)
        panel = asyncio.create_task(self._show_panel())
        try:
            return await self._run_roles()
        finally:
            await self._end_all()
            panel.cancel()
            await asyncio.gather(panel, return_exceptions=True)

    def _interrupt(self, number: int) -> None:
        if not self._interrupted.done():
            self._interrupted.set_result(128 + number)
        elif number == signal.SIGINT and not self._hurried.done():  # the others come twice without any hurry
            self._hurried.set_result(None)

    async def _run_roles(self) -> int:
        config = self._config
        ready = []
        for role, section in (("rollout", config.rollout), ("teacher", config.teacher)):
            await self._start(role, section.cuda_devices)
            wait = asyncio.create_task(self._wait_ready(role, section.server_urls()[0], section.startup_timeout_s))
            if servers_share_a_gpu(config):
                if (code := await self._first(wait)) is not None:
                    return code
            else:
                ready.append(wait)
        if ready and (code := await self._first(asyncio.gather(*ready))) is not None:
            return code
        await self._start("trainer", config.student.cuda_devices)
        code = await self._first(None)
        assert code is not None
        return code

    async def _first(self, goal: "asyncio.Future[Any] | None") -> int | None:
        """Wait for `goal`, an interruption, or the end of any child; returns None when the goal came first."""
        exits = {asyncio.create_task(child.wait()): child for child in self._children.values()}
        waiting: set[asyncio.Future[Any]] = {*exits, self._interrupted, *([goal] if goal is not None else [])}
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in exits:
            task.cancel()
        if goal is not None and goal not in done:
            goal.cancel()
            await asyncio.gather(goal, return_exceptions=True)
        if self._interrupted in done:
            return self._interrupted.result()
        ended = sorted((exits[task] for task in done if task in exits), key=_cause_first)
        if ended:
            await ended[0].last_words(_LAST_WORDS_S)
            return self._explain_end(ended[0])
        assert goal is not None
        goal.result()
        return None

    def _explain_end(self, child: Child) -> int:
        code = child.process.returncode or 0
        if child.role == "trainer" and code == 0:
            return 0
        how = f"exited with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        self._say(f"the {child.role} {how}; ending the others", style="bold red")
        # A server that ends by itself has failed, whatever code it gives.
        return code if code > 0 else 128 - code if code < 0 else StartupError.exit_code

    async def _start(self, role: str, cuda_devices: str | None) -> None:
        environment = {**_SHARED_CORES, **os.environ, "PYTHONUNBUFFERED": "1"}
        if cuda_devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = cuda_devices
        process = await asyncio.create_subprocess_exec(
            *self._command(role, self._run_file),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent(),
            limit=1 << 20,
        )
        child = Child(role, process)
        child.reader = asyncio.create_task(self._relay(child))
        self._children[role] = child
        self._status[role] = "starting"

    async def _relay(self, child: Child) -> None:
        assert child.process.stdout is not None
        while line := await _read_line(child.process.stdout):
            text = line.decode(errors="replace").rstrip().rsplit("\r", 1)[-1]  # of a progress bar, the last state
            if text:
                prefix = Text(f"{child.role:<8}| ", style=_COLOURS[child.role])
                self._print(prefix + Text.from_ansi(text))

    async def _wait_ready(self, role: str, url: str, timeout_s: float) -> None:
        async with httpx.AsyncClient(timeout=5.0) as client:
            try:
                async with asyncio.timeout(timeout_s):
                    while not await _is_ready(client, url):
                        await asyncio.sleep(_POLL_S)
            except TimeoutError:
                raise StartupError(
                    f"the {role} server at {url} is not ready after {timeout_s:.0f} s; look at its log above or raise "
                    f"{role}.startup_timeout_s"
                ) from None
        self._status[role] = "ready"
        self._say(f"the {role} server is ready at {url}")

    async def _end_all(self) -> None:
        """The trainer first, so that it can save the student and say goodbye to servers that still live; then the servers."""
        for roles, grace_s in ((("trainer",), _SAVING_GRACE_S), (("rollout", "teacher"), self._grace_s)):
            children = [self._children[role] for role in roles if role in self._children]
            for child in children:
                if child.process.returncode is None:
                    if child.role == "trainer":
                        self._say(
                            "waiting for the trainer, which saves the student first; another Ctrl-C ends everything at once"
                        )
                    child.signal(signal.SIGTERM)
            await asyncio.gather(*(self._end(child, grace_s) for child in children))

    async def _end(self, child: Child, grace_s: float) -> None:
        ended = asyncio.create_task(child.wait())
        waiting: list[asyncio.Future[Any]] = [ended, self._hurried]
        await asyncio.wait(waiting, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            ended.cancel()
            late = "is not waited for" if self._hurried.done() else f"did not end within {grace_s:g} s"
            self._say(f"the {child.role} {late}, killing it", style="red")
        child.signal(signal.SIGKILL)  # whatever is left of its session
        await child.wait()
        self._status[child.role] = "ended"
        await child.last_words(_LAST_WORDS_S)
        if child.reader is not None:
            child.reader.cancel()

    async def _show_panel(self) -> None:
        if not self._console.is_terminal:
            return
        path = Path(self._config.output.dir) / "metrics.jsonl"
        with Live(console=self._console, transient=True, auto_refresh=False) as live:
            while True:
                row, elapsed_s = last_step(path, since=self._started), time.time() - self._started
                live.update(render(row, self._status, elapsed_s), refresh=True)
                await asyncio.sleep(_POLL_S)

    def _say(self, message: str, style: str = "bold") -> None:
        self._print(Text("up      | ", style="yellow") + Text(message, style=style))

    def _print(self, text: Text) -> None:
        try:
            self._console.print(text, soft_wrap=True)
        except SystemExit:
            # rich's answer to a reader that has gone away (`| head`), after which it prints nothing more. A task
            # that ended with it would leave the roles blocked on a full pipe.
            self._interrupt(signal.SIGPIPE)


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:  # a line beyond the limit: show that there was one
        return b"(a very long line was left out)\n"


async def _is_ready(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/ready")).is_success
    except httpx.TransportError:
        return False


def _cause_first(child: Child) -> int:
    """Of several that ended at once: a trainer that is done, then servers, then a trainer that failed for want of one."""
    if child.role != "trainer":
        return 1
    return 0 if child.process.returncode == 0 else 2


def _end_with_parent() -> Callable[[], object] | None:
    """For the child, before exec: let the kernel end it when `up` is killed without a chance to do so (Linux)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: the loader's lock may be held in the child
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
