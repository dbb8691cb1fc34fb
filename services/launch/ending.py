"""How processes of a run are ended: told to, waited for, and killed when they do not."""

import asyncio
import math
import signal
import time
from collections.abc import Sequence

from services.launch.panel import Stage
from services.launch.role_process import RoleProcess
from services.launch.run_folder import RunFolder
from services.launch.screen import Screen

GRACE_S = 20.0
# While a run starts nobody has work to finish, and who has changed his mind should not wait.
_GRACE_AT_START_S = 8.0
# The trainer saves the student first, which for billions of parameters takes minutes on a slow disk.
_SAVING_GRACE_S = 600.0
# Of ranks, when another one has ended: to end by themselves, and then when they are told to.
RANKS_GRACE_S, TOLD_GRACE_S = 12.0, 6.0
POLL_S = 0.25
LAST_WORDS_S = 1.0


class Ending:
    """Ends processes of one run.

    Args:
        grace_s: how long a server that is asked to end may take before it is killed, seconds.
    """

    def __init__(self, folder: RunFolder, screen: Screen, grace_s: float) -> None:
        self._folder, self._screen, self._grace_s = folder, screen, grace_s
        self._hurried = asyncio.Event()
        self._saver: RoleProcess | None = None
        """Rank 0, which writes what the trainer saves."""

    def hurry(self) -> None:
        """From now on nobody is waited for."""
        self._hurried.set()

    def check_log(self, role: RoleProcess) -> None:
        """Say it where a log lacks something."""
        if role.log.problem is not None:
            self._screen.say(f"{role.log.path} is not complete: {role.log.problem}", role.id.name, style="red")

    def close(self, role: RoleProcess) -> None:
        """Give back what a process that has ended still has here."""
        self.check_log(role)
        role.close()

    async def end(self, role: RoleProcess) -> None:
        """Tell a server to end, and kill it if it does not."""
        await self._end(role, self._grace())

    async def end_ranks(self, ranks: Sequence[RoleProcess], lost: RoleProcess | None) -> None:
        """Rank 0 ends the others; where a rank was lost, the others end by themselves. Then whoever is left."""
        left = list(ranks)
        self._saver = next((rank for rank in left if rank.id.leads), None)
        if left and lost not in left:
            saves = self._folder.has_begun()
            await self._end(left.pop(0), _SAVING_GRACE_S if saves else self._grace(), saves=saves)
        for rank in left:
            if rank.is_running:
                self._screen.stages[rank.id.name] = Stage("ending", time.monotonic())
        await self._wait_for(left, self._grace(RANKS_GRACE_S))
        await asyncio.gather(*(self._end(rank, self._grace(TOLD_GRACE_S)) for rank in left))

    async def _end(self, role: RoleProcess, grace_s: float, *, saves: bool = False) -> None:
        """Tell it to end, and kill it if it does not.

        Args:
            saves: whether it saves the student first.
        """
        name = role.id.name
        if role.is_running:
            if saves:
                self._screen.stage(name, "saving the student", "first; another Ctrl-C ends everything at once")
            else:
                self._screen.stages[name] = Stage("ending", time.monotonic())
            role.signal(signal.SIGTERM)
        await self._wait_for([role], grace_s)
        if role.is_running:
            late = "is not waited for" if self._hurried.is_set() else f"did not end within {grace_s:g} s"
            self._screen.say(f"the {role.id.title} {late}, killing it", name, style="red")
        await role.kill()
        await role.last_words(LAST_WORDS_S)
        self._screen.stages.pop(name, None)

    def _grace(self, most_s: float = math.inf) -> float:
        """How long a role may take to end, seconds."""
        return min(self._grace_s, most_s, math.inf if self._folder.has_begun() else _GRACE_AT_START_S)

    async def _wait_for(self, roles: Sequence[RoleProcess], grace_s: float) -> None:
        """Until roles have ended, a second Ctrl-C comes, or the time is over; while rank 0 writes there is more.

        What it was writing when it was killed stays half written.
        """
        began, may_save = time.monotonic(), any(role.id.trains for role in roles)
        while any(role.is_running for role in roles) and not self._hurried.is_set():
            waited_s = time.monotonic() - began
            lives = may_save and self._saver is not None and self._saver.is_running
            is_saving = lives and waited_s < _SAVING_GRACE_S and self._folder.is_saving()
            if waited_s >= grace_s and not is_saving:
                return
            await asyncio.sleep(POLL_S)
