"""A run's hold on its rollout servers, renewed from a thread of its own: a trainer that computes for minutes still lives."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable

from services.errors import ServerHeldError, ServerRestartedError, WeightSyncError

logger = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 6

Claim = Callable[[str], Awaitable[None]]
"""Tells one server, by its URL, that the run lives."""


class Lease:
    """Renews until it is closed, each server apart from the others.

    Args:
        connect: called in the thread, makes what claims a server there.
        lease_s: what a claim is good for, seconds.
        on_restart: called in the thread, told of a server that was started again; it is not renewed any more.
    """

    def __init__(
        self, connect: Callable[[], Claim], lease_s: float, on_restart: Callable[[str], object] = lambda url: None
    ) -> None:
        self._connect, self._every_s, self._on_restart = connect, lease_s / _RENEWALS_PER_LEASE, on_restart
        self._urls: set[str] = set()
        self._silent: set[str] = set()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost: str | None = None
        """Why the run does not hold its servers any more: another run has taken one."""

    def add(self, url: str) -> None:
        """A server that the run has been given, or that answers again."""
        self._urls.add(url)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="weight-lease", daemon=True)
            self._thread.start()

    def remove(self, url: str) -> None:
        """A server that takes no part any more: it is free once its lease is over."""
        self._urls.discard(url)

    def close(self) -> None:
        """Renew no more; a renewal that is under way is waited for."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(self._every_s)

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            claim = self._connect()
            while not self._closed.wait(self._every_s):
                runner.run(self._renew(claim))

    async def _renew(self, claim: Claim) -> None:
        await asyncio.gather(*(self._renew_one(claim, url) for url in sorted(self._urls)))

    async def _renew_one(self, claim: Claim, url: str) -> None:
        try:
            async with asyncio.timeout(self._every_s):
                await claim(url)
            self._silent.discard(url)
        except ServerRestartedError:
            self.remove(url)
            self._on_restart(url)
        except ServerHeldError as error:
            if url in self._urls:  # one that has left meanwhile may be anybody's
                self.lost = self.lost or str(error)
        except (WeightSyncError, TimeoutError) as error:
            if not self._closed.is_set() and url not in self._silent:
                self._silent.add(url)  # told once, however long it lasts
                logger.warning("%s was not told that this run lives: %s", url, str(error) or "no answer")
