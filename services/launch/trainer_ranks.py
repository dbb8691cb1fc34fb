"""The trainer's ranks: started together, watched together, and together started again from the run's checkpoint.

    all start ──► rank 0 is done ──► complete
              └─► a rank is lost ──► the others end by themselves, or are ended ──► pause ──► all start again

They go on from the newest checkpoint that this run has written; without one, they begin once more as they did.

Ctrl-C goes to rank 0 alone, which ends the other ranks in order. When a rank is lost, the others notice it themselves, and
one of them saves the student; they are signalled when they have not ended after a while.
"""

import asyncio
import signal
import time

from services.errors import RankLostError
from services.launch.digest import why_it_ended
from services.launch.ending import LAST_WORDS_S, POLL_S, Ending
from services.launch.ranks import MASTER_ADDRESS
from services.launch.restarts import RestartPolicy, mends_trainer
from services.launch.role_process import RoleId, RoleProcess
from services.launch.role_starter import RoleStarter
from services.launch.run_folder import RunFolder
from services.launch.screen import Screen
from services.process.startup import reserve_port

_USUALLY = "usually 15 to 40 s"


class TrainerRanks:
    """Starts the ranks, waits until the trainer is done, and starts all of them again.

    Args:
        count: ranks.
        policy: how often all of them are started again.
    """

    def __init__(
        self,
        count: int,
        folder: RunFolder,
        starter: RoleStarter,
        screen: Screen,
        ending: Ending,
        policy: RestartPolicy,
    ) -> None:
        self.processes: list[RoleProcess] = []
        """Those that were started last."""
        self._count, self._folder, self._starter = count, folder, starter
        self._screen, self._ending, self._policy = screen, ending, policy
        self._lost: RoleProcess | None = None

    @property
    def num_restarts(self) -> int:
        """Starts again so far."""
        return self._policy.count

    async def keep(self) -> RoleProcess:
        """Until the trainer has ended for good; returns rank 0 when it is complete, else the rank that is to blame.

        A trainer that has not begun to train fails by what it was given, or by a lack of memory, and is not started again.

        Raises:
            StartupError, OutputError: as of `RoleStarter.rank`.
        """
        doing = "starting"
        while True:
            process = await self._run(doing)
            code = await process.wait()
            if code == 0 and process.id.leads:
                return process
            self._lost = process
            if not (mends_trainer(code) and self._folder.has_begun()):
                return process
            if (pause_s := self._policy.backoff_s(time.monotonic())) is None:
                return process
            doing = f"starting again ({self._policy})"
            why = why_it_ended(process.id.title, code, process.log.tail)
            self._screen.stage("trainer", doing, f"in {pause_s:g} s: {why}")
            await self._clear()
            await asyncio.sleep(pause_s)

    async def end(self) -> None:
        """End all of them in order, whatever they do."""
        await self._ending.end_ranks(self.processes, self._lost)

    async def _clear(self) -> None:
        """Until nothing is left of ranks of which one was lost."""
        stage = self._screen.stages["trainer"]
        await self.end()
        self._screen.stages["trainer"] = stage
        for rank in self.processes:
            self._ending.close(rank)
        self.processes, self._lost = [], None

    async def _run(self, doing: str) -> RoleProcess:
        """Start all ranks; returns rank 0 when it is done, else the rank that is to blame for the end."""
        master = reserve_port("trainer", MASTER_ADDRESS, 0)
        resume = self.num_restarts > 0 and self._folder.has_checkpoint()
        try:
            for number in range(self._count):
                role = RoleId("trainer", number, self._count)
                rank = await self._starter.rank(role, master.port, resume=resume)
                self.processes.append(rank)
                if role.leads:  # of the other ranks there is nothing to say while all is well
                    self._screen.stage(role.name, doing, self._more(rank, resume=resume))
            return await self._first_end()
        finally:
            master.release()

    def _more(self, rank: RoleProcess, *, resume: bool) -> str:
        """What is said of a start besides."""
        if not self.num_restarts:
            return f"({_USUALLY})"
        where = "from its newest checkpoint" if resume else "as it began"
        return f"{where} ({_USUALLY}), its log is {rank.log.path.name}"

    async def _first_end(self) -> RoleProcess:
        ends = [asyncio.create_task(self._ended(rank)) for rank in self.processes]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()
        return await self._first_cause()

    async def _ended(self, rank: RoleProcess) -> None:
        """Wait for an end that ends the run: a rank that is done waits for rank 0, which may have more to do."""
        if await rank.wait() == 0:
            await self.processes[0].wait()

    async def _first_cause(self) -> RoleProcess:
        """Of the ranks that have ended, the one that is to blame, which may end a moment after another one."""
        for _ in range(round(LAST_WORDS_S / POLL_S)):
            rank = min((rank for rank in self.processes if not rank.is_running), key=_cause_first)
            if rank.process.returncode == 0 or self._count == 1:
                break
            await asyncio.sleep(POLL_S)
        await rank.last_words(LAST_WORDS_S)
        return rank


def _cause_first(rank: RoleProcess) -> tuple[int, float]:
    """Of several that ended at once: a rank 0 that is done, then what failed for want of another: one that was killed, else
    the first that does not say itself that it has lost another. One that aborts may have, too."""
    code = rank.process.returncode or 0
    if code == 0:
        place = 0 if rank.id.leads else 4
    elif code == RankLostError.exit_code:
        place = 3
    else:
        place = 1 if code < 0 and code != -signal.SIGABRT else 2
    return place, rank.ended_at
