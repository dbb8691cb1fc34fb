"""One server of a run, which is started again when it dies after it was ready.

    start ──► ready ──► it dies ──► what is left of it is killed ──► pause ──► start ──► ready again ──► ...

A server that ends before it was ever ready has a wrong option or no room, and is not started again.
"""

import asyncio
import time

import httpx

from services.config import ServerSection
from services.errors import StartupError
from services.http.connections import async_client
from services.http.guard import LAUNCH_HEADER
from services.launch.digest import why_it_ended
from services.launch.ending import LAST_WORDS_S, POLL_S, Ending
from services.launch.restarts import RestartPolicy, mends_server
from services.launch.role_process import RoleProcess
from services.launch.role_starter import RoleStarter
from services.launch.screen import Screen
from services.launch.servers import Server
from services.process.startup import check_port

_USUALLY = {
    "rollout": "usually 30 s to 2 min; the first time a model is downloaded, longer",
    "teacher": "usually 10 to 30 s; the first time a model is downloaded, longer",
}
# For what a killed server has left to be gone from its port.
_PORT_S = 10.0


class KeptServer:
    """Starts a server, waits until it is ready, and starts it again.

    Args:
        policy: how often it is started again.
        turn: held from a start again until it is ready; servers on one GPU share it, for vLLM measures what is free there.
    """

    def __init__(
        self,
        server: Server,
        starter: RoleStarter,
        screen: Screen,
        ending: Ending,
        policy: RestartPolicy,
        turn: asyncio.Lock,
    ) -> None:
        self.id = server.role
        self.process: RoleProcess | None = None
        """The last one that was started."""
        self.last_dead: RoleProcess | None = None
        """The last one that died after it was ready, or on the way there again."""
        self.was_ready = asyncio.Event()
        """Set once it has been ready."""
        self._server, self._starter, self._screen, self._ending = server, starter, screen, ending
        self._policy, self._turn = policy, turn
        self._is_over = False

    @property
    def num_restarts(self) -> int:
        """Starts again in a row."""
        return self._policy.count

    def give_up(self) -> None:
        """From now on it is not started again."""
        self._is_over = True

    async def keep(self) -> RoleProcess:
        """Until it has ended for good; returns the process that did.

        Raises:
            StartupError: it cannot be started, is not ready in time, or another program answers in its place.
            OutputError: its log cannot be made.
        """
        process = await self._start()
        self._screen.stage(self.id.name, "starting", f"({_USUALLY[self.id.role]})")
        if await self._becomes_ready(process):
            self._screen.stage(self.id.name, "ready", f"at {self._server.url}")
            self.was_ready.set()
            while (pause_s := await self._pause_after_end(process)) is not None:
                process = await self._start_again(process, pause_s)
        return process

    async def _start(self) -> RoleProcess:
        self.process = await self._starter.server(self.id, self._server.run_file)
        return self.process

    async def _pause_after_end(self, process: RoleProcess) -> float | None:
        """Wait for the end of a server; returns the pause before it is started again, seconds, None if it is not."""
        code = await process.wait()
        self.last_dead = process
        if self._is_over or not mends_server(code):
            return None
        if (pause_s := self._policy.backoff_s(time.monotonic())) is None:
            return None
        await process.last_words(LAST_WORDS_S)
        why = why_it_ended(self.id.title, code, process.log.tail)
        self._screen.stage(self.id.name, f"starting again ({self._policy})", f"in {pause_s:g} s: {why}")
        return pause_s

    async def _start_again(self, dead: RoleProcess, pause_s: float) -> RoleProcess:
        """The process that takes the place of a dead one, ready, or ended as well."""
        since = time.monotonic()
        await dead.kill()  # what is left of its session would hold its port and its GPU
        self._ending.close(dead)
        await asyncio.sleep(pause_s)
        async with self._turn:
            await self._wait_for_port()
            process = await self._start()
            if await self._becomes_ready(process):
                now = time.monotonic()
                self._policy.is_healthy(now)
                more = f"again after {now - since:.0f} s at {self._server.url}, its log is {process.log.path.name}"
                self._screen.stage(self.id.name, "ready", more)
        return process

    async def _wait_for_port(self) -> None:
        """Until nobody has the server's port; one that stays taken the server reports itself."""
        section: ServerSection = getattr(self._server.config, self.id.role)
        deadline = time.monotonic() + _PORT_S
        while time.monotonic() < deadline:
            try:
                check_port(self.id.role, section.host, section.port)
            except StartupError:
                await asyncio.sleep(POLL_S)
            else:
                return

    async def _becomes_ready(self, process: RoleProcess) -> bool:
        """Wait until it is ready, or has ended; returns whether it is ready."""
        role, url, timeout_s = self.id.role, self._server.url, self._server.startup_timeout_s
        async with async_client([url], timeout_s=5.0) as client:
            try:
                async with asyncio.timeout(timeout_s):
                    while process.is_running:
                        if await self._is_ready(client):
                            return True
                        await asyncio.sleep(POLL_S)
            except TimeoutError:
                raise StartupError(
                    f"the {role} server at {url} is not ready after {timeout_s:.0f} s; look at its log or raise "
                    f"{role}_client.startup_timeout_s"
                ) from None
        return False

    async def _is_ready(self, client: httpx.AsyncClient) -> bool:
        role, url = self.id.role, self._server.url
        try:
            response = await client.get(f"{url}/ready")
        except httpx.TransportError:
            return False
        if response.is_success and response.headers.get(LAUNCH_HEADER) != self._starter.launch:
            raise StartupError(
                f"another program answers at {url}, where the {role} server of this run was to listen; end it or pass "
                f"--{role}.port with a free port"
            )
        return response.is_success
