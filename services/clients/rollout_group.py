"""Which rollout servers take part: the one place that knows.

    live    holds the newest weights, gets prompts
    away    does not answer, or not as it should; it is asked every other second how it is
    back    answers again, but holds other weights: the next push takes it in

produces   the servers to ask, and how fast each of them has been
waits for  servers that are away, for at most `outage_s`
unblocked  by their answer; by a push, where a server is back
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol

import httpx

from services.errors import OutageError, WeightsWantedError
from services.http.connections import describe
from services.wire.rollout import RolloutCompletion, RolloutInfo

logger = logging.getLogger(__name__)

_ANSWER_S = 5.0
"""How long a server that is away may take to say how it is."""
_FIRST_POLL_S, _LONGEST_POLL_S = 0.25, 2.0
# A server that fails what it is asked so soon after its return, with nothing completed, was not really back.
_TRIAL_S = 30.0
_FIRST_REST_S, _LONGEST_REST_S = 2.0, 60.0
"""How long it is then left alone, longer each time."""
_RELAPSES_TOLD = 2
# What a new measurement of a server's speed counts, against all earlier ones.
_NEWEST = 0.3
_SLOWEST = 0.1
"""Least share of the fastest server's prompts that a slow one gets: what gets none is never measured again."""


class Labels(Protocol):
    """What a run knows of the labels of its pushes; trainer/weights/policy_versions.py."""

    @property
    def current(self) -> str | None:
        """That of the newest push, None before the first."""

    def of(self, completion: RolloutCompletion) -> object:
        """Raises a PeerError where a token was not sampled under a push of the run."""


@dataclass(eq=False)
class _Server:
    """What is known of one server; times are of the clock of its group, seconds."""

    url: str
    state: Literal["live", "away", "back"] = "live"
    boot_id: str | None = None
    """Of the process that the run holds; None: of whatever process answers."""
    speed: float | None = None
    """Tokens a second, a moving average over calls."""
    reason: str = ""
    """What follows the URL in a message that says why it is not live."""
    failing_since: float = 0.0
    returned_at: float | None = None
    """None once it has completed something since its return."""
    needs_weights: bool = False
    """Whether only a push can make it live, whatever label it says."""
    info: RolloutInfo | None = None
    """What it says of itself, while it is back."""
    refused: str | None = None
    """Boot id of a process that the run does not want."""
    num_polls: int = 0
    num_relapses: int = 0
    """How often it has left again, since it last completed something."""
    watching: asyncio.Task[None] | None = None


class RolloutGroup:
    """The rollout servers by URL; all are live at first.

    Args:
        ask: a server for its info.
        outage_s: how long servers are waited for.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        urls: list[str],
        ask: Callable[[str], Awaitable[RolloutInfo]],
        outage_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.urls, self.outage_s, self._ask, self._clock = urls, outage_s, ask, clock
        self._servers = {url: _Server(url) for url in urls}
        self._changed = asyncio.Event()
        self._num_waiting = 0
        self._is_closed = False
        self.labels: Labels | None = None
        """Of the run that holds the servers; None: nobody minds under which label they sample."""
        self.on_leave: Callable[[str], None] = lambda url: None
        self.on_return: Callable[[str], None] = lambda url: None
        self.weights_wanted = asyncio.Event()
        """Set while completions are waited for that only a push makes possible."""

    # ---- who is there

    @property
    def live(self) -> list[str]:
        return [url for url, server in self._servers.items() if server.state == "live"]

    @property
    def is_elsewhere_work(self) -> bool:
        """Whether a server that fails is left at once: others can do its work, or a run watches over its label."""
        return self.labels is not None or len(self.urls) > 1

    def back(self) -> dict[str, RolloutInfo]:
        """What the servers that the next push takes in say of themselves."""
        found = {url: server.info for url, server in self._servers.items() if server.state == "back"}
        return {url: info for url, info in found.items() if info is not None}

    def manage(self, boot_ids: dict[str, str], labels: Labels) -> None:
        """From here on a server counts as live with these boot ids and the newest of these labels alone."""
        self.labels = labels
        for url, boot_id in boot_ids.items():
            self._servers[url].boot_id = boot_id

    async def some_live(self, *, waits_for_weights: bool) -> list[str]:
        """At least one live server.

        Args:
            waits_for_weights: where all that answer are back, wait for the push; `weights_wanted` is set meanwhile.

        Raises:
            OutageError: none has answered for `outage_s`.
            WeightsWantedError: all that answer wait for a push, and the caller does not.
        """
        self._num_waiting += waits_for_weights
        try:
            while not (live := self.live):
                if (back := self.back()) and not waits_for_weights:
                    raise WeightsWantedError(
                        f"{', '.join(back)} answers again, but holds no weights of this run until the next push"
                    )
                self._tell_who_pushes()
                await self._wait(1)
            return live
        finally:
            self._num_waiting -= waits_for_weights
            self._tell_who_pushes()

    async def some_for_a_push(self, at_least: int) -> None:
        """Wait until enough servers are live or back.

        Raises:
            OutageError: fewer have answered for `outage_s`.
        """
        while len(self.live) + len(self.back()) < at_least:
            await self._wait(at_least)

    async def _wait(self, at_least: int) -> None:
        """Until something changes."""
        changed, left_s = self._changed, self.outage_s - self._lasted_s(at_least)
        if left_s <= 0:
            raise self.outage(at_least)
        with suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._tell_who_pushes()

    def _tell_who_pushes(self) -> None:
        if self._num_waiting and self.back() and not self.live:
            self.weights_wanted.set()
        else:
            self.weights_wanted.clear()

    def _lasted_s(self, at_least: int) -> float:
        """For how long fewer than `at_least` servers have answered."""
        failing = sorted(s.failing_since for s in self._servers.values() if s.state == "away")
        num_spare = len(self._servers) - at_least
        return self._clock() - failing[num_spare] if len(failing) > num_spare else 0.0

    def outage(self, at_least: int) -> OutageError:
        """The error after an outage that was too long."""
        away = [server for server in self._servers.values() if server.state == "away"]
        said = "; ".join(f"{s.url} {s.reason} (for {self._clock() - s.failing_since:.0f} s)" for s in away)
        if at_least > 1:
            who = f"fewer than pipeline.min_rollout_servers = {at_least} rollout servers have answered"
        else:
            who = "no rollout server has answered" if len(self.urls) > 1 else "the rollout server has not answered"
        fix = ""
        if self.labels is not None:
            it = "it" if len(away) == 1 else "them"
            fix = f"; start {it} again and run the same command again, which resumes the run"
        return OutageError(
            f"{who} for {self.outage_s:g} s (rollout_client.outage_s): {said}{fix}; to wait longer, raise "
            "rollout_client.outage_s (of a client in Python: outage_s)"
        )

    # ---- who leaves and who returns

    def leave(
        self,
        url: str,
        reason: str,
        *,
        needs_weights: bool = False,
        num_missing: int = 0,
        asked_at: float | None = None,
    ) -> None:
        """A server is away from now on, and watched.

        Args:
            reason: what follows its URL, e.g. "cannot be reached: ...".
            needs_weights: only a push makes it live again.
            num_missing: completions that it was asked for and has not sent.
            asked_at: when it was asked for what it failed; None: now.
        """
        server, now = self._servers[url], self._clock()
        server.needs_weights |= needs_weights
        if server.state == "away":
            return
        asked_at = now if asked_at is None else asked_at
        is_on_trial = server.returned_at is not None and asked_at - server.returned_at < _TRIAL_S
        was_on_trial = server.state == "back" or is_on_trial
        server.state, server.reason, server.info, server.num_polls = "away", reason, None, 0
        if was_on_trial:
            server.num_relapses += 1
        else:
            server.failing_since, server.num_relapses = now, 0
        others = "the others" if self.live else "whoever answers first"
        more = f"; its {num_missing} completions go to {others}" if num_missing else ""
        self._log(server, logging.WARNING, "%s is away: it %s%s", url, reason, more)
        self.on_leave(url)
        if not self._is_closed and (server.watching is None or server.watching.done()):
            server.watching = asyncio.create_task(self._watch(server), name=f"watch {url}")
        self._notify()

    async def check(self, url: str) -> bool:
        """Whether a server answers, and as the process that it was; else it is away."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                info = await self._ask(url)
        except Exception as error:
            self.leave(url, _said(error))
            return False
        if self._servers[url].boot_id not in (None, info.boot_id):
            self.leave(url, "was started again", needs_weights=True)
            return False
        return True

    def refuse(self, url: str, boot_id: str, reason: str) -> None:
        """This process of a server takes no part any more; the next one may."""
        server = self._servers[url]
        server.refused = boot_id
        self.leave(url, f"{reason}; it takes no part until it is started again", needs_weights=True)

    def pushed(self, boot_ids: dict[str, str]) -> None:
        """These servers hold the newest weights, and no others do."""
        for url, server in self._servers.items():
            if url in boot_ids:
                server.boot_id, server.needs_weights = boot_ids[url], False
                self._return(server)
            elif server.state == "live":
                self.leave(url, "returned too late for the last push", needs_weights=True)

    def completed(self, url: str) -> None:
        """A server has sent a completion that counts."""
        server = self._servers[url]
        server.returned_at, server.num_polls = None, 0

    def _return(self, server: _Server) -> None:
        if server.state == "live":
            return
        now = self._clock()
        self._log(server, logging.INFO, "%s is back after %.1f s", server.url, now - server.failing_since)
        server.state, server.info, server.returned_at = "live", None, now
        self.on_return(server.url)
        self._notify()

    def _log(self, server: _Server, level: int, text: str, *arguments: object) -> None:
        """What happens to a server again and again is told a few times."""
        logger.log(level if server.num_relapses <= _RELAPSES_TOLD else logging.DEBUG, text, *arguments)

    async def _watch(self, server: _Server) -> None:
        """Ask a server how it is until it is live."""
        while server.state != "live":
            await asyncio.sleep(self._poll_s(server))
            server.num_polls += 1
            try:
                async with asyncio.timeout(_ANSWER_S):
                    info = await self._ask(server.url)
            except Exception as error:  # asked again, whatever it is
                self._is_silent(server, error)
            else:
                if server.state != "live":  # else a push has taken it in meanwhile
                    self._answers(server, info)
            self._notify()

    def _poll_s(self, server: _Server) -> float:
        if server.num_polls == 0:
            rest_s = _FIRST_REST_S * 2.0 ** min(server.num_relapses - 1, 16)
            return min(_LONGEST_REST_S, rest_s) if server.num_relapses else 0.0
        growing = _FIRST_POLL_S * 2.0 ** min(server.num_polls - 1, 16)
        return min(_LONGEST_POLL_S, growing) * random.uniform(1.0, 1.25)

    def _is_silent(self, server: _Server, error: Exception) -> None:
        server.reason = _said(error)
        if server.state == "back":
            server.state, server.info, server.failing_since = "away", None, self._clock()

    def _answers(self, server: _Server, info: RolloutInfo) -> None:
        if info.boot_id == server.refused:
            return
        is_the_same = server.boot_id in (None, info.boot_id) and not server.needs_weights
        if is_the_same and (self.labels is None or info.policy_version == self.labels.current):
            self._return(server)
            return
        if server.state == "away":
            how = "as it was" if info.boot_id == server.boot_id else "started again"
            self._log(server, logging.INFO, "%s answers again, %s: it takes part after the next push", server.url, how)
        server.state, server.info = "back", info

    # ---- how fast they are

    def measured(self, url: str, num_tokens: int, seconds: float) -> None:
        """A server took so long for so many tokens."""
        if seconds <= 0 or num_tokens <= 0:
            return
        server, speed = self._servers[url], num_tokens / seconds
        server.speed = speed if server.speed is None else (1 - _NEWEST) * server.speed + _NEWEST * speed

    def weights(self, urls: list[str]) -> dict[str, float]:
        """How much of the work each of these servers should get, against each other."""
        known = [speed for url in urls if (speed := self._servers[url].speed) is not None]
        if not known:
            return dict.fromkeys(urls, 1.0)
        usual, least = sum(known) / len(known), _SLOWEST * max(known)
        return {url: max(least, self._servers[url].speed or usual) for url in urls}

    async def close(self) -> None:
        """Watch nobody any more."""
        self._is_closed = True
        watching = [server.watching for server in self._servers.values() if server.watching is not None]
        for task in watching:
            task.cancel()
        if watching:
            await asyncio.wait(watching)


def _said(error: Exception) -> str:
    """Why a server does not say how it is, as what follows its URL."""
    if isinstance(error, httpx.RequestError):
        return describe(error, "rollout_client.request_timeout_s")
    if isinstance(error, TimeoutError):
        return f"is silent: no answer within {_ANSWER_S:g} s"
    return f"is not ready: {error}"
