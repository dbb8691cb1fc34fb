"""`distillserve up`: the three roles as processes of this machine, started, watched and ended together.

    starts     rollout servers and teacher (one after the other when they share a GPU: vLLM asserts when another
               process frees memory while it measures), waits until all are ready, then the trainer's ranks
    ends       all of them when the trainer's rank 0 is done, when any of them dies, or on Ctrl-C

Ctrl-C goes to rank 0 alone, which ends the other ranks in order. When a rank is lost, the others notice it themselves, and
one of them saves the student; they are signalled when they have not ended after a while.

honcho and circus were considered: honcho starts everything at once and cannot wait for readiness, circus
brings a daemon with sockets of its own. What is needed beyond asyncio's subprocesses is little.
"""

import asyncio
import json
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from services.config import RunConfig, check_output_dir
from services.config.keys import Secrets, make_key, reveal
from services.errors import RankLostError, StartupError
from services.gpus.plan import plan
from services.gpus.sharing import check_nccl, servers_share_a_gpu
from services.http.connections import async_client
from services.http.guard import LAUNCH_HEADER, LAUNCH_VARIABLE
from services.launch.digest import cause, how_it_ended, last_lines
from services.launch.panel import Stage
from services.launch.ranks import MASTER_ADDRESS, with_rank, without_rank
from services.launch.role_process import RoleId, RoleLog, RoleProcess
from services.launch.run_folder import RunFolder, run_folder, written
from services.launch.screen import Screen
from services.launch.servers import Server, refuse_urls, rollout_runs, with_free_ports
from services.launch.summary_table import summary_table
from services.process.folder_lock import FolderLock, lock_folder
from services.process.startup import check_model_folder, check_output_room, check_socket_folder, reserve_port
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
# Of ranks, when another one has ended: to end by themselves, and then when they are told to.
_RANKS_GRACE_S, _TOLD_GRACE_S = 12.0, 6.0
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
    check_start(config)
    with ExitStack() as stack:
        lock = stack.enter_context(lock_folder(Path(config.output.dir), "output.dir", "`distillserve up`"))
        moved, folder, servers = prepare(config, stack)
        wanted = wanted_ports(config)

        async def supervise() -> int:
            return await Supervisor(moved, servers, folder, lock, command, grace_s, verbose).run(wanted)

        return asyncio.run(supervise())


def check_start(config: RunConfig) -> None:
    """What is found out before a run's folder is touched.

    Raises:
        ConfigError, StartupError: as of `up`.
    """
    refuse_urls(config)
    check_model_folder("student.model", config.student.model or "")
    check_model_folder("teacher.model", config.teacher.model or "")
    check_socket_folder()
    _share_gpus(config)


def prepare(config: RunConfig, stack: ExitStack) -> tuple[RunConfig, RunFolder, list[Server]]:
    """The run on ports that are free, its folder, and the servers to start; the stack gives all of it back.

    Raises:
        ConfigError, StartupError: as of `up`.
    """
    output_dir = check_output_dir(config)
    check_output_room(output_dir)
    moved, reservations = with_free_ports(config)
    for reservation in reservations:
        stack.callback(reservation.release)
    folder = stack.enter_context(run_folder(output_dir, moved))
    return moved, folder, _servers(moved, folder.run_file, stack)


def wanted_ports(config: RunConfig) -> dict[str, int]:
    """The port of each kind of server that a run names."""
    return {name: getattr(config, name).port for name in ("rollout", "teacher")}


def _share_gpus(config: RunConfig) -> None:
    """Show what each role is computed to take of its GPU; after what is checked in no time, for a hub may be asked.

    Raises:
        ConfigError: of `check_nccl` and of `plan`.
    """
    check_nccl(config)
    found = plan(config)
    for line in found.lines() if found is not None else ():
        say(line)


def _servers(config: RunConfig, run_file: Path, stack: ExitStack) -> list[Server]:
    """The servers to start; of several rollout servers each reads a run file of its own, which goes with the stack."""
    servers, runs = [], rollout_runs(config)
    for index, run in enumerate(runs):
        role, path = RoleId("rollout", index, len(runs)), run_file
        if len(runs) > 1:
            path = stack.enter_context(written(run_file.with_suffix(f".rollout-{index + 1}.json"), run))
        servers.append(Server(role, run, path))
    return [*servers, Server(RoleId("teacher"), config, run_file)]


class Supervisor:
    """Starts, watches and ends the roles of one run.

    Args:
        lock: of the run's folder, shared with the trainer; None where that is started by others.
        screen: shows what happens; default: this process's console.
    """

    def __init__(
        self,
        config: RunConfig,
        servers: Sequence[Server],
        folder: RunFolder,
        lock: FolderLock | None,
        command: Command,
        grace_s: float,
        verbose: bool,
        screen: Screen | None = None,
    ) -> None:
        self._config, self._servers, self._folder, self._lock = config, servers, folder, lock
        self._command, self._grace_s, self._verbose = command, grace_s, verbose
        self._launch = secrets.token_hex(16)
        self._keys = run_keys()
        self._roles: list[RoleProcess] = []
        self._failed: RoleProcess | None = None
        self._why = ""
        loop = asyncio.get_running_loop()
        self._interrupted: asyncio.Future[int] = loop.create_future()
        self._hurried: asyncio.Future[None] = loop.create_future()  # by a second Ctrl-C
        metrics = self._folder.path / "metrics.jsonl"
        self.screen = screen or Screen(
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
            for role in self._roles:
                role.close()

    def _interrupt(self, number: int) -> None:
        if not self._interrupted.done():
            self._interrupted.set_result(128 + number)
            if number != signal.SIGPIPE:
                self.screen.say(f"{signal.Signals(number).name}: ending all roles")
        elif number == signal.SIGINT and not self._hurried.done():  # the others come twice without any hurry
            self._hurried.set_result(None)

    async def _run_roles(self) -> int:
        code = await self._start_servers()
        return await self._train() if code is None else code

    async def _start_servers(self) -> int | None:
        """Until all are ready; the exit code of the run where it has ended before."""
        self.screen.say(f"this run is in {self._folder.path}, what its roles say in {self._folder.path / 'logs'}")
        groups = [self._servers]
        if any(servers_share_a_gpu(server.config) for server in self._servers):
            groups = [[one for one in self._servers if one.role.role == role] for role in ("rollout", "teacher")]
        for group in groups:
            ready = []
            for server in group:
                process = await self._start(server.role, server.run_file)
                ready.append(asyncio.create_task(self._wait_ready(process, server)))
            if (code := await self._first(asyncio.gather(*ready))) is not None:
                return code
        return None

    async def _train(self) -> int:
        """Until the trainer is done or anybody ends; returns the exit code of the run."""
        count, master = self._config.trainer.num_processes, reserve_port("trainer", MASTER_ADDRESS, 0)
        try:
            for rank in range(count):
                await self._start(RoleId("trainer", rank, count), self._folder.run_file, master.port)
            code = await self._first(None)
        finally:
            master.release()
        assert code is not None
        return code

    async def _first(self, goal: "asyncio.Future[Any] | None") -> int | None:
        """Wait for `goal`, an interruption, or the end of any role; returns None when the goal came first."""
        exits = [asyncio.create_task(self._ended(role)) for role in self._roles]
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

    async def _ended(self, role: RoleProcess) -> None:
        """Wait for an end that ends the run: a rank that is done waits for rank 0, which may have more to do."""
        if await role.wait() == 0 and role.id.trains:
            await self._ranks()[0].wait()

    def _ranks(self) -> list[RoleProcess]:
        return [role for role in self._roles if role.id.trains]

    async def _first_cause(self) -> RoleProcess:
        """Of the roles that have ended, the one that is to blame. A trainer fails at once when a server breaks off, the
        server may need a moment more to end."""
        for _ in range(round(_LAST_WORDS_S / _POLL_S)):
            role = min((role for role in self._roles if not role.is_running), key=_cause_first)
            if not role.id.trains or role.process.returncode == 0:
                break
            await asyncio.sleep(_POLL_S)
        return role

    def _note_end(self, role: RoleProcess) -> int:
        code = role.process.returncode or 0
        if role.id.leads and code == 0:
            return 0
        title = role.id.title
        said, how = cause(role.log.tail), f"the {title} {how_it_ended(code)}"
        self._failed, self._why = role, how if said is None or code < 0 else f"the {title} failed: {said}"
        self.screen.say(f"{how}; ending the others", style="bold red")
        # A server that ends by itself has failed, whatever code it gives.
        return code if code > 0 else 128 - code if code < 0 else StartupError.exit_code

    async def _start(self, role: RoleId, run_file: Path, master_port: int = 0) -> RoleProcess:
        """Start a process of the run.

        Args:
            master_port: at which the trainer's ranks find each other.
        """
        environment = {**_SHARED_CORES, **without_rank(os.environ), **self._keys, LAUNCH_VARIABLE: self._launch}
        # The trainer alone writes into the folder. What a server may leave behind when `up` is killed must not hold it.
        works_in_folder = role.trains
        if works_in_folder:
            assert self._lock is not None
            environment |= self._lock.environment()
            environment = with_rank(environment, role.number, role.count, master_port)
        process = await RoleProcess.start(
            role,
            self._command(role.role, run_file),
            environment,
            RoleLog(self._folder.path / "logs" / role.log_name),
            self.screen.role_said,
            pass_fds=() if self._lock is None or not works_in_folder else (self._lock.descriptor,),
        )
        self._roles.append(process)
        if role.leads or not role.trains:  # of the other ranks there is nothing to say while all is well
            self.screen.stage(role.name, "starting", f"({_USUALLY[role.role]})")
        return process

    async def _wait_ready(self, process: RoleProcess, server: Server) -> None:
        role, url, timeout_s = server.role, server.url, server.startup_timeout_s
        async with async_client([url], timeout_s=5.0) as client:
            try:
                async with asyncio.timeout(timeout_s):
                    while not await self._is_ready(client, role.role, url):
                        await asyncio.sleep(_POLL_S)
            except TimeoutError:
                self._failed = self._failed or process  # of two, the one that the error names
                raise StartupError(
                    f"the {role.role} server at {url} is not ready after {timeout_s:.0f} s; look at its log or raise "
                    f"{role.role}_client.startup_timeout_s"
                ) from None
        self.screen.stage(role.name, "ready", f"at {url}")

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
        await self._end_ranks()
        servers = [role for role in self._roles if not role.id.trains]
        await asyncio.gather(*(self._end(server, self._grace()) for server in servers))

    async def _end_ranks(self) -> None:
        """Rank 0 ends the others; where a rank was lost, the others end by themselves. Then whoever is left."""
        ranks = self._ranks()
        if ranks and self._failed not in ranks:
            saves = self._folder.has_begun()
            await self._end(ranks.pop(0), _SAVING_GRACE_S if saves else self._grace(), saves=saves)
        for rank in ranks:
            if rank.is_running:
                self.screen.stages[rank.id.name] = Stage("ending", time.monotonic())
        await self._wait_for(ranks, self._grace(_RANKS_GRACE_S))
        await asyncio.gather(*(self._end(rank, self._grace(_TOLD_GRACE_S)) for rank in ranks))

    async def _end(self, role: RoleProcess, grace_s: float, *, saves: bool = False) -> None:
        """Tell it to end, and kill it if it does not.

        Args:
            saves: whether it saves the student first.
        """
        name = role.id.name
        if role.is_running:
            if saves:
                self.screen.stage(name, "saving the student", "first; another Ctrl-C ends everything at once")
            else:
                self.screen.stages[name] = Stage("ending", time.monotonic())
            role.signal(signal.SIGTERM)
        await self._wait_for([role], grace_s)
        if role.is_running:
            late = "is not waited for" if self._hurried.done() else f"did not end within {grace_s:g} s"
            self.screen.say(f"the {role.id.title} {late}, killing it", name, style="red")
        await role.kill()
        await role.last_words(_LAST_WORDS_S)
        self.screen.stages.pop(name, None)

    def _grace(self, most_s: float = math.inf) -> float:
        """How long a role may take to end, seconds."""
        return min(self._grace_s, most_s, math.inf if self._folder.has_begun() else _GRACE_AT_START_S)

    async def _wait_for(self, roles: Sequence[RoleProcess], grace_s: float) -> None:
        """Until roles have ended, a second Ctrl-C comes, or the time is over; a rank that writes the student has more."""
        began, may_save = time.monotonic(), any(role.id.trains for role in roles)
        while any(role.is_running for role in roles) and not self._hurried.done():
            waited_s = time.monotonic() - began
            is_saving = may_save and waited_s < _SAVING_GRACE_S and self._folder.is_saving()
            if waited_s >= grace_s and not is_saving:
                return
            await asyncio.sleep(_POLL_S)

    def _explain(self) -> None:
        """What came of the run: the table, or why there is none."""
        if self._folder.has_begun():
            self._show_results()
        for role in self._roles:
            if role.log.problem is not None:
                self.screen.say(f"{role.log.path} is not complete: {role.log.problem}", role.id.name, style="red")
        if self._failed is None:
            return
        name, log = self._failed.id.name, self._failed.log
        if not self._verbose:
            for line in last_lines(log.tail):
                self.screen.say(f"... {line}", name)
        self.screen.say(f"these are the last lines of {log.path}", name)
        if self._why:
            self.screen.say(self._why, style="bold red")

    def _show_results(self) -> None:
        summary, student = self._folder.path / "summary.json", self._folder.path / "student"
        if summary.exists():
            content = json.loads(summary.read_text())
            self.screen.table(summary_table(content))
            for failed in content["failed_evaluations"]:
                self.screen.say(f"not measured after step {failed['step']}: {failed['reason']}", "trainer")
        if self._folder.is_ours(student):
            what = "student" if summary.exists() else "student of the last finished step"
            self.screen.say(f"{what} saved in {student}", "trainer")


def run_keys() -> dict[str, str]:
    """Environment variables with the keys of a run's servers, random where the environment names none: other users of this
    machine, and web pages, reach its loopback too."""
    given = Secrets()
    keys = {"DISTILLSERVE_ROLLOUT_KEY": given.rollout_key, "DISTILLSERVE_TEACHER_KEY": given.teacher_key}
    variables = {name: reveal(key) or make_key() for name, key in keys.items()}
    return variables | {f"{name}_FILE": "" for name in keys}


def _cause_first(role: RoleProcess) -> tuple[int, float]:
    """Of several that ended at once: a trainer that is done, then servers, then what failed for want of another: of ranks
    one that was killed, else the first that does not say itself that it has lost another. One that aborts may have, too."""
    code = role.process.returncode or 0
    if not role.id.trains:
        place = 1
    elif code == 0:
        place = 0 if role.id.leads else 5
    elif code == RankLostError.exit_code:
        place = 4
    else:
        place = 2 if code < 0 and code != -signal.SIGABRT else 3
    return place, role.ended_at
