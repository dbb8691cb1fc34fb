"""The trainer's calls of `/v1/weights/...` on several rollout servers at once: all of them, or the error of the first that failed.

A run holds its servers from `hold` to `release`, and a thread renews its lease meanwhile (lease.py): a trainer that is killed is
known to be gone after it. A server that is gone is left out (`leave_out`) and, once it is back, held anew (`rejoin`). The stages
are those of services/rollout/weights.py.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import httpx
from pydantic import ValidationError

from services.clients.base import all_or_first_error
from services.config.own_key import OwnKeyAuth
from services.errors import ClientClosedError, ServerHeldError, ServerRestartedError, StartupError, WeightSyncError
from services.http.connections import CONNECT_TIMEOUT_S, async_client, describe, retry_after_s
from services.weight_transfer.lease import Claim, Lease
from services.wire.weights import NOT_HELD, CanaryScores

logger = logging.getLogger(__name__)

# A server keeps the deadline of a stage itself, and answers then: it is waited for a little longer than it takes.
_ANSWER_S = 20.0
_RELEASE_S = 10.0
_PROBE_S = 5.0
_LONGEST_LEASE_S = 3600.0
_NAME_CHARACTERS = 300
_CONFLICT, _NOT_FOUND = 409, 404


class WeightControlClient:
    """Control of a group of rollout servers by one run.

    Args:
        urls: base URLs of the servers, in rank order.
        boot_ids: of the servers, as they were when the run attached.
        world_sizes: worker processes of each server, data parallel included.
        run: id of the run.
        name: what a person knows the run by.
        key: bearer token of the servers; None: servers of this machine have made their own.
        stage_timeout_s: deadline of each stage.
        lease_s: silence after which the servers count this run as gone.
        on_restart: told, in another thread, of a server that was started again.
        transport: replaces the network in tests.

    Raises:
        StartupError: two URLs lead to one server.
    """

    def __init__(
        self,
        urls: list[str],
        boot_ids: list[str],
        world_sizes: list[int],
        *,
        run: str,
        name: str,
        key: str | None,
        stage_timeout_s: float,
        lease_s: float,
        on_restart: Callable[[str], object] = lambda url: None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.urls, self.world_sizes, self.run = list(urls), list(world_sizes), run
        self._boot_ids = dict(zip(urls, boot_ids, strict=True))
        if len(set(boot_ids)) < len(boot_ids):
            raise StartupError(f"rollout_client.urls = {urls} lead to one server twice; name each once")
        self._name, self._timeout_s, self._lease_s = name[:_NAME_CHARACTERS], stage_timeout_s, lease_s
        self._client = partial(
            async_client, urls, stage_timeout_s + _ANSWER_S, key, transport, None if key else OwnKeyAuth()
        )
        self._http = self._client()
        self._lease = Lease(self._claimer, lease_s, on_restart)
        self._held: list[str] = []

    # ---- the lease

    async def hold(self, *, take_over: bool = False, on_wait: Callable[[str, float], None] | None = None) -> None:
        """Make the servers this run's own. One that a silent run holds is waited for until its lease is over.

        Args:
            take_over: take them from a run that lives.
            on_wait: told of a server that another run holds, and for how many seconds it is waited for.

        Raises:
            ServerHeldError: a run that lives holds one of them; none is held then.
            WeightSyncError: a server cannot be asked.
        """
        try:
            # In one order for everybody, whatever they call the servers: of two runs that want the same one gets them all.
            for url in sorted(self.urls, key=self._boot_ids.__getitem__):
                await self._hold_one(url, take_over, on_wait)
        except WeightSyncError:
            await self.release()
            raise

    async def _hold_one(self, url: str, take_over: bool, on_wait: Callable[[str, float], None] | None) -> None:
        self._held.append(url)  # who is cancelled while the server answers may have been given it
        try:
            try:
                await self._claim(self._http, url, take_over)
            except ServerHeldError as error:
                # A run that was killed renews no more; one that lives does, and is still there afterwards.
                left_s = min(error.left_s, _LONGEST_LEASE_S)
                if on_wait is not None:
                    on_wait(url, left_s)
                await asyncio.sleep(left_s + 1.0)
                await self._claim(self._http, url, take_over)
        except ServerHeldError:
            self._held.remove(url)
            raise
        self._lease.add(url)

    async def _claim(self, http: httpx.AsyncClient, url: str, take_over: bool = False) -> None:
        body = {"name": self._name, "lease_s": self._lease_s, "take_over": take_over}
        boot_id = (await self._call(url, "hold", body, http=http)).get("boot_id")
        if boot_id != self._boot_ids[url]:
            raise ServerRestartedError(f"{url} was started again while this run held it")

    @property
    def boot_ids(self) -> dict[str, str]:
        """Of the servers that take part, by URL."""
        return {url: self._boot_ids[url] for url in self.urls}

    async def rejoin(self, url: str, boot_id: str, world_size: int) -> None:
        """Make a server that is back this run's own again; its ranks are the last ones.

        Raises:
            ServerHeldError: a run that lives holds it now.
            WeightSyncError: it cannot be asked, or was started again meanwhile.
        """
        self._boot_ids[url] = boot_id
        await self._claim(self._http, url)
        self._held.append(url)
        self._lease.add(url)
        self.urls.append(url)
        self.world_sizes.append(world_size)

    def leave_out(self, url: str) -> None:
        """Push without a server; it is free once its lease is over."""
        self._lease.remove(url)
        self._held = [held for held in self._held if held != url]
        index = self.urls.index(url)
        del self.urls[index], self.world_sizes[index]

    def renew(self, url: str, *, renews: bool) -> None:
        """Whether a server is told that the run lives: one that is away is not."""
        if renews and url in self.urls:
            self._lease.add(url)
        else:
            self._lease.remove(url)

    async def probe(self) -> dict[str, str]:
        """Why which servers cannot be pushed to, as what follows their URLs; those that have forgotten the run are held again.

        Raises:
            ServerHeldError: another run holds one of them.
        """
        reasons = await asyncio.gather(*map(self._probe, self.urls))
        return {url: reason for url, reason in zip(self.urls, reasons, strict=True) if reason is not None}

    async def _probe(self, url: str) -> str | None:
        try:
            async with asyncio.timeout(_PROBE_S):
                await self._claim(self._http, url)
                ready = await self._http.get(f"{url}/ready")  # `hold` answers also where the engine is dead
        except ServerHeldError:
            raise
        except ServerRestartedError:
            return "was started again"
        except TimeoutError:
            return f"is silent: no answer within {_PROBE_S:g} s"
        except WeightSyncError as error:
            return f"does not answer: {error}"
        except httpx.RequestError as error:
            return describe(error, "weight_sync.stage_timeout_s")
        return None if ready.is_success else f"is not ready: it answers {ready.status_code}: {_reason(ready)}"

    def _claimer(self) -> Claim:
        http = self._client()
        return lambda url: self._claim(http, url)

    # ---- the stages of a push

    async def connect(self, rendezvous: dict[str, Any]) -> None:
        """Every worker of every server joins the trainer's group, behind the ranks of the servers before it."""
        bodies = [{"rendezvous": {**rendezvous, "rank_offset": offset}} for offset in self.rank_offsets()]
        await self._all("connect", [body | {"timeout_s": self._timeout_s} for body in bodies])

    async def pause(self, drain_s: float) -> None:
        """Let running completions end, hold new ones, drop the caches.

        Args:
            drain_s: how long to wait for running completions, seconds.
        """
        await self._all("pause", [{"drain_s": drain_s}] * len(self.urls), extra_s=drain_s)

    async def start(self) -> None:
        """From here to `finish` the weights are neither the old nor the new ones."""
        await self._all("start")

    async def receive(self, update: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """Returns when the workers have received and loaded everything: the report of each worker of each server."""
        answers = await self._all("receive", [{"update": update}] * len(self.urls))
        for url, answer, count in zip(self.urls, answers, self.world_sizes, strict=True):
            reports = answer.get("workers")
            if not (isinstance(reports, list) and len(reports) == count and all(isinstance(r, dict) for r in reports)):
                raise WeightSyncError(f"receive on {url}: the answer is not a report of each of its {count} workers")
        return [answer["workers"] for answer in answers]

    async def finish(self, label: str) -> None:
        """The weights are whole and called `label`; only the canary is answered yet."""
        await self._all("finish", [{"label": label}] * len(self.urls))

    async def score_canary(self, sequences: list[list[int]]) -> list[CanaryScores]:
        """One answer per server, in the order of the URLs."""
        answers = await self._all("canary", [{"sequences": sequences}] * len(self.urls))
        try:
            return [CanaryScores.model_validate(answer) for answer in answers]
        except ValidationError as error:
            where = ", ".join(self.urls)
            raise WeightSyncError(
                f"canary on {where}: the answer is no CanaryScores: {error.errors()[0]['msg']}"
            ) from error

    async def resume(self) -> None:
        """Everybody may sample."""
        await self._all("resume")

    async def release(self) -> None:
        """Leave every server as another trainer wants to find it; one that cannot be reached forgets the run by itself."""
        await asyncio.to_thread(self._lease.close)  # a renewal that comes after the release would hold a server again
        held, self._held = self._held, []
        with suppress(TimeoutError):
            async with asyncio.timeout(_RELEASE_S):
                for left in await asyncio.gather(
                    *(self._call(url, "release", {}) for url in held), return_exceptions=True
                ):
                    if isinstance(left, Exception):
                        logger.debug("%s", left)

    # ---- around it

    def rank_offsets(self) -> list[int]:
        """1 + the world sizes of the servers before; rank 0 is the trainer."""
        return [1 + sum(self.world_sizes[:index]) for index in range(len(self.urls))]

    async def close(self) -> None:
        await self._http.aclose()

    async def _all(
        self, stage: str, bodies: list[dict[str, Any]] | None = None, extra_s: float = 0.0
    ) -> list[dict[str, Any]]:
        """The answers in the order of the URLs; at the first error the other servers are not waited for."""
        if self._http.is_closed:
            raise ClientClosedError(f"the weight control client of {', '.join(self.urls)} is closed; make a new one")
        if self._lease.lost is not None:
            raise ServerHeldError(self._lease.lost)
        bodies = bodies or [{}] * len(self.urls)
        return await all_or_first_error(
            [self._call(url, stage, body, extra_s) for url, body in zip(self.urls, bodies, strict=True)]
        )

    async def _call(
        self, url: str, stage: str, body: dict[str, Any], extra_s: float = 0.0, http: httpx.AsyncClient | None = None
    ) -> dict[str, Any]:
        started = time.monotonic()
        timeout = httpx.Timeout(self._timeout_s + _ANSWER_S + extra_s, connect=min(self._timeout_s, CONNECT_TIMEOUT_S))
        try:
            response = await (http or self._http).post(
                f"{url}/v1/weights/{stage}", json=body | {"run": self.run}, timeout=timeout
            )
        except httpx.RequestError as error:
            elapsed = time.monotonic() - started
            said = describe(error, "weight_sync.stage_timeout_s")
            raise WeightSyncError(f"{stage} on {url} failed after {elapsed:.1f} s: it {said}") from error
        if not response.is_success:
            raise _refusal(url, stage, response, time.monotonic() - started)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise WeightSyncError(
                f"{stage} on {url}: the answer is no JSON object; it is not a distillserve rollout server"
            )
        return answer


def _refusal(url: str, stage: str, response: httpx.Response, elapsed: float) -> WeightSyncError:
    status, reason = response.status_code, _reason(response)
    if status == _CONFLICT and _of_problem(response, "title") == NOT_HELD:
        return ServerRestartedError(f"{stage} on {url}: {reason}")
    if status == _CONFLICT:
        return ServerHeldError(f"{stage} on {url}: {reason}", retry_after_s(response) or 0.0)
    more = ""
    if status in (401, 403):
        more = "; give its key in DISTILLSERVE_ROLLOUT_KEY"
    elif status == _NOT_FOUND:
        more = "; it is not a distillserve rollout server of this version"
    return WeightSyncError(f"{stage} on {url} answered {status} after {elapsed:.1f} s: {reason}{more}")


def _reason(response: httpx.Response) -> str:
    """The detail of a problem document, or the beginning of what came instead."""
    detail = _of_problem(response, "detail")
    return response.text[:300] if detail is None else " ".join(detail.split())


def _of_problem(response: httpx.Response, field: str) -> str | None:
    """A field of a problem document; None where there is none."""
    try:
        return str(response.json()[field])
    except (ValueError, TypeError, KeyError):
        return None
