"""`distillserve up`: the three roles as processes of this machine, started, watched and ended together.

    starts     rollout servers and teacher (one after the other when they share a GPU: vLLM asserts when another
               process frees memory while it measures), waits until all are ready, then the trainer's ranks
    restarts   a server that dies after it was ready (kept_server.py); the trainer from its checkpoint, where
               up.restart_trainer says so (trainer_ranks.py)
    ends       all of them when the trainer's rank 0 is done, when any of them dies for good, or on Ctrl-C

Each server, and the ranks of the trainer together, have a task that keeps them; the supervisor waits for the first that is
over, then cancels all of these tasks, so that nothing is started any more, and ends what lives.

honcho and circus were considered: honcho starts everything at once and cannot wait for readiness, circus
brings a daemon with sockets of its own. What is needed beyond asyncio's subprocesses is little.
"""

import asyncio
import json
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from services.config import RunConfig
from services.errors import OutageError, StartupError
from services.gpus.sharing import servers_share_a_gpu
from services.launch.digest import how_it_ended, last_lines, why_it_ended
from services.launch.ending import GRACE_S, LAST_WORDS_S, POLL_S, Ending
from services.launch.kept_server import KeptServer
from services.launch.preparation import check_start, prepare, wanted_ports
from services.launch.restarts import HEALTHY_S, RestartPolicy
from services.launch.role_process import RoleProcess
from services.launch.role_starter import Command, RoleStarter, role_command
from services.launch.run_folder import RunFolder
from services.launch.screen import Screen
from services.launch.servers import Server
from services.launch.summary_table import summary_table
from services.launch.trainer_ranks import TrainerRanks
from services.process.folder_lock import FolderLock, lock_folder


def up(
    config: RunConfig,
    command: Command = role_command,
    grace_s: float = GRACE_S,
    verbose: bool = False,
) -> int:
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
        self._config, self._folder, self._verbose = config, folder, verbose
        self._failed: RoleProcess | None = None
        self._why = ""
        self._interrupted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        metrics = folder.path / "metrics.jsonl"
        self.screen = screen or Screen(
            verbose=verbose, metrics=metrics, on_reader_gone=lambda: self._interrupt(int(signal.SIGPIPE))
        )
        self._starter = RoleStarter(folder, lock, command, self.screen.role_said)
        self._ending = Ending(folder, self.screen, grace_s)
        self._share_a_gpu = any(servers_share_a_gpu(server.config) for server in servers)
        turn = asyncio.Lock()
        self._servers = [
            KeptServer(
                server,
                self._starter,
                self.screen,
                self._ending,
                RestartPolicy(config.up.restart_servers, config.up.restart_backoff_s, HEALTHY_S),
                turn if self._share_a_gpu else asyncio.Lock(),
            )
            for server in servers
        ]
        self._trainer: TrainerRanks | None = None
        self._keeping: dict[asyncio.Task[RoleProcess], KeptServer | None] = {}
        """What keeps each server; None: the trainer."""

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
            for role in self._processes():
                role.close()

    def _interrupt(self, number: int) -> None:
        if not self._interrupted.done():
            self._interrupted.set_result(128 + number)
            if number != signal.SIGPIPE:
                self.screen.say(f"{signal.Signals(number).name}: ending all roles")
        elif number == signal.SIGINT:  # the others come twice without any hurry
            self._ending.hurry()

    async def _run_roles(self) -> int:
        code = await self._start_servers()
        return await self._train() if code is None else code

    async def _start_servers(self) -> int | None:
        """Until all are ready; the exit code of the run where it has ended before."""
        self.screen.say(f"this run is in {self._folder.path}, what its roles say in {self._folder.path / 'logs'}")
        groups = [self._servers]
        if self._share_a_gpu:
            groups = [[one for one in self._servers if one.id.role == role] for role in ("rollout", "teacher")]
        for group in groups:
            for server in group:
                self._keeping[asyncio.create_task(server.keep())] = server
            if (code := await self._first(asyncio.gather(*(server.was_ready.wait() for server in group)))) is not None:
                return code
        return None

    async def _train(self) -> int:
        """Until the trainer is done or anybody ends for good; returns the exit code of the run."""
        self._trainer = TrainerRanks(
            self._config.trainer.num_processes,
            self._folder,
            self._starter,
            self.screen,
            self._ending,
            RestartPolicy(self._config.up.restart_trainer, self._config.up.restart_backoff_s),
        )
        self._keeping[asyncio.create_task(self._trainer.keep())] = None
        code = await self._first(None)
        assert code is not None
        return code

    async def _first(self, goal: "asyncio.Future[Any] | None") -> int | None:
        """Wait for `goal`, an interruption, or the end of any role for good; returns None when the goal came first."""
        waiting: set[asyncio.Future[Any]] = {*self._keeping, self._interrupted, *([goal] if goal is not None else [])}
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if goal is not None and goal not in done:
            goal.cancel()
            await asyncio.gather(goal, return_exceptions=True)
        if self._interrupted in done:
            return self._interrupted.result()
        over = [task for task in self._keeping if task in done]
        if over:
            role = await self._first_cause(over)
            await role.last_words(LAST_WORDS_S)
            return self._note_end(role)
        assert goal is not None
        goal.result()
        return None

    async def _first_cause(self, over: "list[asyncio.Task[RoleProcess]]") -> RoleProcess:
        """Of the roles that have ended for good, the one that is to blame.

        Raises:
            StartupError, OutputError: a role could not be started.
        """
        for task in over:
            server = self._keeping[task]
            if task.exception() is not None and server is not None:
                self._failed = self._failed or server.process  # of two, the one that the error names
        ended = [task.result() for task in over]
        for server in self._servers:
            server.give_up()
        role = min(ended, key=_cause_first)
        if role.id.trains and role.process.returncode not in (0, OutageError.exit_code):
            return await self._server_that_broke_off(role) or role
        return role

    async def _server_that_broke_off(self, trainer: RoleProcess) -> RoleProcess | None:
        """A server that died when the trainer failed, which it does at once when a server breaks off; the server may need a
        moment more to end."""
        for _ in range(round(LAST_WORDS_S / POLL_S)):
            dead = [server.last_dead for server in self._servers if server.last_dead is not None]
            near = [server for server in dead if server.ended_at > trainer.ended_at - LAST_WORDS_S]
            if near:
                return min(near, key=lambda server: server.ended_at)
            await asyncio.sleep(POLL_S)
        return None

    def _note_end(self, role: RoleProcess) -> int:
        code = role.process.returncode or 0
        if role.id.leads and code == 0:
            return 0
        title = role.id.title
        self._failed, self._why = role, why_it_ended(title, code, role.log.tail)
        self.screen.say(f"the {title} {how_it_ended(code)}{self._after(role)}; ending the others", style="bold red")
        # A server that ends by itself has failed, whatever code it gives.
        return code if code > 0 else 128 - code if code < 0 else StartupError.exit_code

    def _after(self, role: RoleProcess) -> str:
        """How often a role had been started again."""
        kept = self._trainer if role.id.trains else next(one for one in self._servers if one.id == role.id)
        count = kept.num_restarts if kept is not None else 0
        return f", after {count} restart{'s' if count > 1 else ''}" if count else ""

    def _processes(self) -> list[RoleProcess]:
        """Of every role those that were started last."""
        servers = [server.process for server in self._servers if server.process is not None]
        return [*servers, *(self._trainer.processes if self._trainer is not None else [])]

    async def _end_all(self) -> None:
        """The trainer first, so that it can save the student and say goodbye to servers that still live; then the servers."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        if self._trainer is not None:
            await self._trainer.end()
        servers = [server.process for server in self._servers if server.process is not None]
        await asyncio.gather(*map(self._ending.end, servers))

    def _explain(self) -> None:
        """What came of the run: the table, or why there is none."""
        if self._folder.has_begun():
            self._show_results()
        for role in self._processes():
            self._ending.check_log(role)
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


def _cause_first(role: RoleProcess) -> tuple[int, float]:
    """Of several that ended for good at once: a trainer that is done, then servers, then a trainer that failed for want of
    one."""
    if role.id.trains:
        return (0 if role.process.returncode == 0 else 2), role.ended_at
    return 1, role.ended_at
