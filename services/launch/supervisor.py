"""`distillserve up`: the three roles as processes of this machine, started, watched and ended together.

    starts     rollout and teacher (one after the other when they share a GPU: vLLM asserts when another
               process frees memory while it measures), waits until both are ready, then the trainer
    ends       all of them when the trainer is done, when any of them dies, or on Ctrl-C

honcho and circus were considered: honcho starts everything at once and cannot wait for readiness, circus
brings a daemon with sockets of its own. What is needed beyond asyncio's subprocesses is little.
"""

import asyncio
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from services.config import ClientSection, RunConfig, ServerSection, check_output_dir
from services.config.keys import Secrets, make_key, reveal
from services.config.section import Section
from services.errors import ConfigError, StartupError
from services.gpus.plan import plan
from services.gpus.sharing import check_nccl, servers_share_a_gpu
from services.http.connections import async_client
from services.http.guard import LAUNCH_HEADER, LAUNCH_VARIABLE
from services.launch.digest import cause, how_it_ended, last_lines
from services.launch.panel import Stage
from services.launch.role_process import RoleLog, RoleProcess
from services.launch.screen import Screen
from services.launch.summary_table import summary_table
from services.process.files import write_by_rename
from services.process.folder_lock import FolderLock, lock_folder
from services.process.startup import (
    PortReservation,
    check_model_folder,
    check_output_room,
    check_socket_folder,
    reserve_port,
)
from services.process.streams import say

Command = Callable[[str, Path], list[str]]
"""Role and run file to an argument vector; tests put small scripts in place of the real roles."""

# OpenMP threads that spin while they wait for work take the cores from the role whose turn it is: on two cores
# this alone made scoring eight times slower (both names: GNU's and Intel's runtime).
_SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
_GRACE_S = 20.0
# While a run starts nobody has work to finish, and who has changed his mind should not wait.
_GRACE_AT_START_S = 8.0
# The trainer saves the student first, which for billions of parameters takes minutes on a slow disk.
_SAVING_GRACE_S = 600.0
_POLL_S = 0.25
_LAST_WORDS_S = 1.0
_USUALLY = {
    "rollout": "usually 30 s to 2 min; the first time a model is downloaded, longer",
    "teacher": "usually 10 to 30 s; the first time a model is downloaded, longer",
    "trainer": "usually 15 to 40 s",
}


def role_command(role: str, run_file: Path) -> list[str]:
    """The command line of a role."""
    subcommand = "train" if role == "trainer" else role
    return [sys.executable, "-m", "services.cli", subcommand, str(run_file)]


def up(config: RunConfig, command: Command = role_command, grace_s: float = _GRACE_S, verbose: bool = False) -> int:
    """Run all three roles; returns the exit code of the whole.

    Args:
        grace_s: how long a server that is asked to end may take before it is killed, seconds.
        verbose: show all that the roles say, not only what a person has to see.

    Raises:
        ConfigError: the run names servers that somebody else starts, does not fit on its GPUs, or its folder holds an
            earlier run.
        StartupError: a model folder is missing, or the output folder cannot be used.
    """
    refuse_urls(config)
    check_model_folder("student.model", config.student.model or "")
    check_model_folder("teacher.model", config.teacher.model or "")
    check_socket_folder()
    _share_gpus(config)
    with ExitStack() as stack:
        lock = stack.enter_context(lock_folder(Path(config.output.dir), "output.dir", "`distillserve up`"))
        output_dir = check_output_dir(config)
        check_output_room(output_dir)
        moved, reservations = with_free_ports(config)
        for reservation in reservations:
            stack.callback(reservation.release)
        run_file = stack.enter_context(_run_file(output_dir, moved))
        wanted = {name: getattr(config, name).port for name in ("rollout", "teacher")}

        async def supervise() -> int:
            return await Supervisor(moved, run_file, lock, command, grace_s, verbose).run(wanted)

        return asyncio.run(supervise())


def _share_gpus(config: RunConfig) -> None:
    """Show what each role is computed to take of its GPU; after what is checked in no time, for a hub may be asked.

    Raises:
        ConfigError: of `check_nccl` and of `plan`.
    """
    check_nccl(config)
    found = plan(config)
    for line in found.lines() if found is not None else ():
        say(line)


@contextmanager
def _run_file(output_dir: Path, config: RunConfig) -> Iterator[Path]:
    """The run as the roles read it. It becomes the folder's run.json, unless that is of an earlier run which this one
    has not replaced: its trainer writes config.json once every check has passed."""
    ours, final = output_dir / f".run.{os.getpid()}.json", output_dir / "run.json"
    write_by_rename(ours, (config.model_dump_json(indent=2) + "\n").encode())
    try:
        yield ours
    finally:
        with suppress(OSError):  # somebody has removed the folder meanwhile; how the run ended counts
            if not final.exists() or _has_begun(output_dir, ours):
                ours.replace(final)
            ours.unlink(missing_ok=True)


def _has_begun(output_dir: Path, run_file: Path) -> bool:
    """Whether the trainer of this run trains: it writes config.json when every check has passed."""
    try:
        return (output_dir / "config.json").stat().st_mtime_ns >= run_file.stat().st_mtime_ns
    except OSError:  # not there yet, or somebody has removed the folder
        return False


def refuse_urls(config: RunConfig) -> None:
    """Refuse a run that `up` would start servers for which it does not use.

    Raises:
        ConfigError: names the option.
    """
    for name in ("rollout", "teacher"):
        server: ServerSection = getattr(config, name)
        client: ClientSection = getattr(config, f"{name}_client")
        # A run.json that `up` wrote names its own servers; that is no contradiction.
        if client.urls and client.server_urls(server) != [server.url()]:
            raise ConfigError(
                f"{name}_client.urls = {client.urls} names servers that run elsewhere, but `distillserve up` starts its own; "
                f"leave {name}_client.urls out, or attach with `distillserve train`"
            )
    if config.teacher_client.protocol == "vllm":
        raise ConfigError(
            "teacher_client.protocol = vllm is for servers that others start, but `distillserve up` starts its own teacher; "
            "leave it out (teacher.engine = vllm runs that teacher in vLLM), or attach with `distillserve train`"
        )


def with_free_ports(config: RunConfig) -> tuple[RunConfig, list[PortReservation]]:
    """The same run on ports that are free now, with URLs that name them; the ports are ours until they are released."""
    sections: dict[str, Section] = {}
    reservations = []
    for name in ("rollout", "teacher"):
        section: ServerSection = getattr(config, name)
        reservation = reserve_port(name, section.host, section.port)
        reservations.append(reservation)
        moved = section.model_copy(update={"port": reservation.port})
        client: ClientSection = getattr(config, f"{name}_client")
        sections |= {name: moved, f"{name}_client": client.model_copy(update={"urls": [moved.url()]})}
    return config.model_copy(update=sections), reservations


class Supervisor:
    """Starts, watches and ends the roles of one run."""

    def __init__(
        self, config: RunConfig, run_file: Path, lock: FolderLock, command: Command, grace_s: float, verbose: bool
    ) -> None:
        self._config, self._run_file, self._lock = config, run_file, lock
        self._command, self._grace_s, self._verbose = command, grace_s, verbose
        self._output = Path(config.output.dir)
        self._launch = secrets.token_hex(16)
        self._keys = _keys()
        self._roles: dict[str, RoleProcess] = {}
        self._failed: RoleProcess | None = None
        self._why = ""
        loop = asyncio.get_running_loop()
        self._interrupted: asyncio.Future[int] = loop.create_future()
        self._hurried: asyncio.Future[None] = loop.create_future()  # by a second Ctrl-C
        metrics = self._output / "metrics.jsonl"
        self.screen = Screen(
            verbose=verbose, metrics=metrics, on_reader_gone=lambda: self._interrupt(int(signal.SIGPIPE))
        )

    async def run(self, wanted_ports: Mapping[str, int]) -> int:
        """Start, watch, end. Returns 0, the exit code of the role that failed, or 128 + the signal's number.

        Args:
            wanted_ports: of each server; said where another one was taken.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
                loop.add_signal_handler(number, self._interrupt, number)
        for name, wanted in wanted_ports.items():
            port = getattr(self._config, name).port
            if port != wanted:
                self.screen.say(f"{name}.port = {wanted} is in use, taking {port}")
        showing = asyncio.create_task(self.screen.run())
        try:
            return await self._run_roles()
        finally:
            await self._end_all()
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            self._explain()
            for role in self._roles.values():
                role.close()

    def _interrupt(self, number: int) -> None:
        if not self._interrupted.done():
            self._interrupted.set_result(128 + number)
            if number != signal.SIGPIPE:
                self.screen.say(f"{signal.Signals(number).name}: ending all roles")
        elif number == signal.SIGINT and not self._hurried.done():  # the others come twice without any hurry
            self._hurried.set_result(None)

    async def _run_roles(self) -> int:
        config = self._config
        self.screen.say(f"this run is in {self._output}, what its roles say in {self._output / 'logs'}")
        ready = []
        for role, server, client in (
            ("rollout", config.rollout, config.rollout_client),
            ("teacher", config.teacher, config.teacher_client),
        ):
            await self._start(role)
            wait = asyncio.create_task(self._wait_ready(role, server.url(), client.startup_timeout_s))
            if servers_share_a_gpu(config):
                if (code := await self._first(wait)) is not None:
                    return code
            else:
                ready.append(wait)
        if ready and (code := await self._first(asyncio.gather(*ready))) is not None:
            return code
        await self._start("trainer")
        code = await self._first(None)
        assert code is not None
        return code

    async def _first(self, goal: "asyncio.Future[Any] | None") -> int | None:
        """Wait for `goal`, an interruption, or the end of any role; returns None when the goal came first."""
        exits = {asyncio.create_task(role.wait()): role for role in self._roles.values()}
        waiting: set[asyncio.Future[Any]] = {*exits, self._interrupted, *([goal] if goal is not None else [])}
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in exits:
            task.cancel()
        if goal is not None and goal not in done:
            goal.cancel()
            await asyncio.gather(goal, return_exceptions=True)
        if self._interrupted in done:
            return self._interrupted.result()
        if any(task in done for task in exits):
            role = await self._first_cause()
            await role.last_words(_LAST_WORDS_S)
            return self._note_end(role)
        assert goal is not None
        goal.result()
        return None

    async def _first_cause(self) -> RoleProcess:
        """Of the roles that have ended, the one that is to blame. A trainer fails at once when a server breaks off, the
        server may need a moment more to end."""
        servers = [role for role in self._roles.values() if role.role != "trainer"]
        for _ in range(round(_LAST_WORDS_S / _POLL_S)):
            role = min((role for role in self._roles.values() if not role.is_running), key=_cause_first)
            if role in servers or role.process.returncode == 0:
                break
            await asyncio.sleep(_POLL_S)
        return role

    def _note_end(self, role: RoleProcess) -> int:
        code = role.process.returncode or 0
        if role.role == "trainer" and code == 0:
            return 0
        said, how = cause(role.log.tail), f"the {role.role} {how_it_ended(code)}"
        self._failed, self._why = role, how if said is None or code < 0 else f"the {role.role} failed: {said}"
        self.screen.say(f"{how}; ending the others", style="bold red")
        # A server that ends by itself has failed, whatever code it gives.
        return code if code > 0 else 128 - code if code < 0 else StartupError.exit_code

    async def _start(self, role: str) -> None:
        environment = {**_SHARED_CORES, **os.environ, **self._keys, LAUNCH_VARIABLE: self._launch}
        # The trainer alone writes into the folder. What a server may leave behind when `up` is killed must not hold it.
        works_in_folder = role == "trainer"
        self._roles[role] = await RoleProcess.start(
            role,
            self._command(role, self._run_file),
            environment | (self._lock.environment() if works_in_folder else {}),
            RoleLog(self._output / "logs" / f"{role}.log"),
            self.screen.role_said,
            pass_fds=(self._lock.descriptor,) if works_in_folder else (),
        )
        self.screen.stage(role, "starting", f"({_USUALLY[role]})")

    async def _wait_ready(self, role: str, url: str, timeout_s: float) -> None:
        async with async_client([url], timeout_s=5.0) as client:
            try:
                async with asyncio.timeout(timeout_s):
                    while not await self._is_ready(client, role, url):
                        await asyncio.sleep(_POLL_S)
            except TimeoutError:
                self._failed = self._failed or self._roles[role]  # of two, the one that the error names
                raise StartupError(
                    f"the {role} server at {url} is not ready after {timeout_s:.0f} s; look at its log or raise "
                    f"{role}_client.startup_timeout_s"
                ) from None
        self.screen.stage(role, "ready", f"at {url}")

    async def _is_ready(self, client: httpx.AsyncClient, role: str, url: str) -> bool:
        try:
            response = await client.get(f"{url}/ready")
        except httpx.TransportError:
            return False
        if response.is_success and response.headers.get(LAUNCH_HEADER) != self._launch:
            raise StartupError(
                f"another program answers at {url}, where the {role} server of this run was to listen; end it or pass "
                f"--{role}.port with a free port"
            )
        return response.is_success

    async def _end_all(self) -> None:
        """The trainer first, so that it can save the student and say goodbye to servers that still live; then the servers."""
        for names in (("trainer",), ("rollout", "teacher")):
            roles = [self._roles[name] for name in names if name in self._roles]
            await asyncio.gather(*(self._end(role) for role in roles))

    async def _end(self, role: RoleProcess) -> None:
        has_begun = _has_begun(self._output, self._run_file)
        grace_s = self._grace_s if has_begun else min(self._grace_s, _GRACE_AT_START_S)
        if role.is_running:
            if role.role == "trainer" and has_begun:
                grace_s = _SAVING_GRACE_S
                self.screen.stage("trainer", "saving the student", "first; another Ctrl-C ends everything at once")
            else:
                self.screen.stages[role.role] = Stage("ending", time.monotonic())
            role.signal(signal.SIGTERM)
        ended = asyncio.create_task(role.wait())
        waiting: list[asyncio.Future[Any]] = [ended, self._hurried]
        await asyncio.wait(waiting, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            ended.cancel()
            late = "is not waited for" if self._hurried.done() else f"did not end within {grace_s:g} s"
            self.screen.say(f"the {role.role} {late}, killing it", role.role, style="red")
        await role.kill()
        await role.last_words(_LAST_WORDS_S)
        self.screen.stages.pop(role.role, None)

    def _explain(self) -> None:
        """What came of the run: the table, or why there is none."""
        if _has_begun(self._output, self._run_file):
            self._show_results()
        for role in self._roles.values():
            if role.log.problem is not None:
                self.screen.say(f"{role.log.path} is not complete: {role.log.problem}", role.role, style="red")
        if self._failed is None:
            return
        name, log = self._failed.role, self._failed.log
        if not self._verbose:
            for line in last_lines(log.tail):
                self.screen.say(f"... {line}", name)
        self.screen.say(f"these are the last lines of {log.path}", name)
        if self._why:
            self.screen.say(self._why, style="bold red")

    def _show_results(self) -> None:
        summary, student = self._output / "summary.json", self._output / "student"
        if summary.exists():
            content = json.loads(summary.read_text())
            self.screen.table(summary_table(content))
            for failed in content["failed_evaluations"]:
                self.screen.say(f"not measured after step {failed['step']}: {failed['reason']}", "trainer")
        if student.exists() and student.stat().st_mtime_ns >= self._run_file.stat().st_mtime_ns:
            what = "student" if summary.exists() else "student of the last finished step"
            self.screen.say(f"{what} saved in {student}", "trainer")


def _keys() -> dict[str, str]:
    """The keys of this run's servers, random where the environment names none: other users of this machine, and web pages,
    reach its loopback too."""
    given = Secrets()
    keys = {"DISTILLSERVE_ROLLOUT_KEY": given.rollout_key, "DISTILLSERVE_TEACHER_KEY": given.teacher_key}
    variables = {name: reveal(key) or make_key() for name, key in keys.items()}
    return variables | {f"{name}_FILE": "" for name in keys}


def _cause_first(role: RoleProcess) -> int:
    """Of several that ended at once: a trainer that is done, then servers, then a trainer that failed for want of one."""
    if role.role != "trainer":
        return 1
    return 0 if role.process.returncode == 0 else 2
