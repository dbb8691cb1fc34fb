"""The client of the rollout servers.

generate()   deals the prompts of a call to the servers that live, in the proportion in which they work
a share      of one server: one request after the other; its completions are kept as they arrive
a failure    marks the server as away (rollout_group.py), and what is missing of its share is dealt to the others
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from services.clients.arguments import check_spellable, integer, prompts_of_ids
from services.clients.base import ServerClient, all_or_first_error
from services.clients.outage import Attempts, Outage, may_pass
from services.clients.replicas import Replicas
from services.clients.rollout_group import RolloutGroup
from services.clients.rollout_requests import Deal, Request, Share, Work
from services.config.own_key import OwnKeyAuth
from services.errors import PeerError, ProblemError
from services.wire.frames import HEARTBEAT_S, read_frames
from services.wire.rollout import RolloutCompletion, RolloutInfo, RolloutSampling, decode_completion
from services.wire.weights import NOT_HELD

logger = logging.getLogger(__name__)

# Of one request: enough to keep the queue of an engine full, few enough to be asked again when a connection breaks.
_COMPLETIONS_PER_REQUEST = 4096
_CONFLICT, _TOO_LARGE = 409, 413
_SILENCE_S = 2.5 * HEARTBEAT_S
"""After which a server counts as gone, where others can do its work."""
_BROKEN_S = 2.0
"""How long errors of a server that answers (5xx) may last, where others can do its work."""
_NOT_THE_SERVER = frozenset((401, 403, 404, 405, *range(300, 400)))
"""Answers to whoever asks, whatever for: of a server with another key, or of another program at its address."""

_OnCompletion = Callable[[RolloutCompletion], None]


class _ServerLeftError(PeerError):
    """A server is not to be asked any more; the message is what follows its URL.

    Args:
        needs_weights: it samples under weights that are not the run's newest.
    """

    def __init__(self, reason: str, *, needs_weights: bool = False) -> None:
        self.needs_weights = needs_weights
        super().__init__(reason)


class _UnusableError(PeerError):
    """A completion that cannot be used, of a server that may live."""


@dataclass(frozen=True)
class _WhileOthersCan:
    """A server that fails is left; one that is only busy is waited for (services/clients/outage.py, `GiveUp`)."""

    url: str
    group: RolloutGroup

    def left_s(self, outage: Outage) -> float:
        error = None if outage.newest is None else outage.newest.error
        if not isinstance(error, ProblemError):
            return 0.0
        if error.retry_after_s is None and error.status not in (408, 429):
            return _BROKEN_S - outage.lasted_s
        can_others = any(url != self.url for url in self.group.live)
        return min(self.group.outage_s, _SILENCE_S if can_others else math.inf) - outage.lasted_s

    def error(self, outage: Outage) -> PeerError:
        assert outage.newest is not None  # a request is given up after a failure
        return _ServerLeftError(outage.newest.said)


@dataclass
class _Call:
    """One call of `generate`.

    Attributes:
        received: by prompt_index and sample_index.
        failed: what the listener raised.
    """

    work: Work
    on_completion: _OnCompletion
    received: dict[tuple[int, int], RolloutCompletion] = field(default_factory=dict)
    failed: BaseException | None = None

    def arrive(self, completion: RolloutCompletion) -> None:
        self.received[completion.prompt_index, completion.sample_index] = completion
        try:
            self.on_completion(completion)
        except BaseException as error:
            self.failed = error
            raise


class RolloutClient(ServerClient):
    """The rollout servers: completions of the student under the weights they hold.

    A lone server that is down, full or slow is asked again for `outage_s`, for what has not arrived; of several servers the
    others do the work of one that is away. One that was started again answers under the version "default": whose a
    completion is, its `policy_versions` say, and whoever trains on it must ask. A run that holds the servers has the client
    ask (`RolloutGroup.manage`): then what `generate` returns is of its own weights alone.
    """

    _KEYLESS_AUTH = OwnKeyAuth()
    _SERVER = "a distillserve rollout server"
    _NOBODY = "a rollout server has not answered"
    _SECTION = "rollout_client"
    _TIMEOUT_OPTION = "rollout_client.request_timeout_s (of a client in Python: timeout_s)"

    def __init__(self, urls: list[str], **options: Any) -> None:
        super().__init__(urls, **options)
        self._limits = dict.fromkeys(self.urls, _COMPLETIONS_PER_REQUEST)
        self.run: str | None = None
        """The run whose completions these are; the servers then refuse (409) what is asked once they are another's."""
        self.group = RolloutGroup(self.urls, self._ask_how_it_is, self._outage_s, self._clock)

    async def close(self) -> None:
        await self.group.close()
        await super().close()

    async def info(self) -> list[RolloutInfo]:
        """One answer per server, in the order of the URLs."""
        return await all_or_first_error([self._retrying(url, self._info) for url in self.urls])

    async def _info(self, url: str) -> RolloutInfo:
        info = await self._get_info(f"{url}/v1/rollouts/info", RolloutInfo)
        self._limits[url] = min(_COMPLETIONS_PER_REQUEST, info.max_completions_per_request)
        return info

    async def _ask_how_it_is(self, url: str) -> RolloutInfo:
        await self._send("GET", f"{url}{self._READY_PATH}")  # the other route answers also where the engine is dead
        return await self._info(url)

    async def generate(
        self,
        prompts: list[list[int]],
        sampling: RolloutSampling,
        samples_per_prompt: int = 1,
        student_top_k: int = 0,
        on_completion: _OnCompletion = lambda completion: None,
        *,
        waits_for_weights: bool = False,
    ) -> list[RolloutCompletion]:
        """Complete any number of prompts, spread over the live servers in proportion to their speed so far.

        A server gets one request after the other: two at once would only wait in its queue until they time out. What it
        calls too large (413) is cut further. What arrived before a connection broke is kept, and only the rest is asked again:
        of the others at once, without others of whoever answers first.

        Args:
            prompts: token ids of each; numpy arrays and torch tensors of integers will do.
            on_completion: called with each as it arrives, in the event loop; what it raises ends the call.
            waits_for_weights: where all servers were started again, wait until somebody pushes weights to them.

        Returns:
            Completions ordered by prompt_index, then sample_index, both those of this call.

        Raises:
            InputError: there is no prompt, one is empty, or ids are no whole numbers; nothing was sent.
            OutageError: no server answered for `outage_s`.
            WeightsWantedError: those that answer hold no weights of the run, which holds them.
            PeerError: a server refused, or the same completions were answered unusably again and again.
        """
        work = Work(prompts_of_ids(prompts), sampling, integer("student_top_k", student_top_k, at_least=0), self.run)
        samples = integer("samples_per_prompt", samples_per_prompt, at_least=1)
        check_spellable("sampling", sampling.model_dump())
        call, deal = _Call(work, on_completion), Deal([len(prompt) for prompt in work.prompts])
        missing = [Request(list(range(len(work.prompts))), 0, samples)]
        asking: dict[asyncio.Task[None], Share] = {}
        try:
            while missing or asking:
                if missing:
                    live = await self.group.some_live(waits_for_weights=waits_for_weights)
                    for share in deal.shares(missing, self.group.weights(live), self._limits):
                        asking[asyncio.create_task(self._complete(share, call))] = share
                await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                missing = await self._settle(asking, call)
        finally:
            await _cancel(asking)
        return [call.received[place] for place in sorted(call.received)]

    async def _settle(self, asking: dict["asyncio.Task[None]", Share], call: _Call) -> list[Request]:
        """Take out the shares that have ended; returns what is to be asked again.

        Raises:
            PeerError: no other server can help.
        """
        missing: list[Request] = []
        for task in [task for task in asking if task.done()]:
            share, error = asking.pop(task), task.exception()
            if error is None:
                continue
            if error is call.failed:
                raise error
            if isinstance(error, _ServerLeftError):
                rest = share.missing(call.received)
                options: dict[str, Any] = {"needs_weights": error.needs_weights, "asked_at": share.asked_at}
                self.group.leave(share.url, str(error), **options, num_missing=sum(map(len, rest)))
            elif self.group.labels is not None and not isinstance(error, ProblemError):
                rest = await self._after_a_bad_answer(share, call, error)
            else:
                raise error
            missing += rest
        gone = {task: share for task, share in asking.items() if share.url not in self.group.live}
        await _cancel(gone)
        for task, share in gone.items():
            del asking[task]
            missing += share.missing(call.received)
        return missing

    async def _after_a_bad_answer(self, share: Share, call: _Call, error: BaseException) -> list[Request]:
        """What a server that lives has answered unusably, a bug of its or ours: asked again, elsewhere where there is one.

        Raises:
            BaseException: the error, where that is of no use.
        """
        reason = str(error) or type(error).__name__
        rest = share.has_failed(call.received, reason)
        is_well = await self.group.check(share.url)
        if is_well and any(request.is_hopeless(self.group.live) for request in rest):
            raise error
        logger.warning("%s; %d completions are asked again", reason, sum(map(len, rest)))
        return rest

    async def _complete(self, share: Share, call: _Call) -> None:
        """Ask for a share, one request after the other; only what has not arrived is asked again."""
        started = self._clock()
        while share.left:
            request = share.current = share.left.pop()
            share.asked_at = self._clock()
            try:
                await self._ask(share, request, call)
                parts = request.without(call.received)
            except ProblemError as error:
                if self._is_not_held(error):
                    raise _ServerLeftError("was started again: it is not held", needs_weights=True) from error
                if self.group.labels is not None and error.status in _NOT_THE_SERVER:
                    raise _ServerLeftError(f"is not what it was: {error}", needs_weights=True) from error
                parts = request.halves() if error.status == _TOO_LARGE else []
                if not parts:
                    raise
            share.current = None
            share.left += reversed(parts)
        self.group.measured(share.url, share.num_tokens, self._clock() - started)

    def _is_not_held(self, error: ProblemError) -> bool:
        return self.group.labels is not None and (error.status, error.problem.get("title")) == (_CONFLICT, NOT_HELD)

    async def _ask(self, share: Share, request: Request, call: _Call) -> None:
        """Hand on what arrives of a request, numbered among the prompts and samples of the call: at least one completion."""
        url, labels = share.url, self.group.labels

        def arrive(completion: RolloutCompletion) -> None:
            if labels is not None:
                try:
                    labels.of(completion)
                except PeerError as error:
                    raise _ServerLeftError(f"is not to be trained on: {error}", needs_weights=True) from error
                if completion.finish_reason == "abort" and not request.failures:  # else it is set aside
                    raise _UnusableError(f"{url} gave up on a completion")
            share.num_tokens += len(completion.token_ids)
            self.group.completed(url)
            where = request.prompt_indices[completion.prompt_index], request.first_sample + completion.sample_index
            call.arrive(replace(completion, prompt_index=where[0], sample_index=where[1]))

        async def read(base: str) -> None:
            body, num_prompts = call.work.body(request), len(request.prompt_indices)
            may_break = not self.group.is_elsewhere_work
            await self._read_completions(base, body, num_prompts, request.num_samples, arrive, may_break=may_break)

        if self.group.is_elsewhere_work:
            alone = Replicas([url], failures_to_eject=1 << 30, longest_rest_s=self._outage_s, clock=self._clock)
            outage = Outage(alone, self._TIMEOUT_OPTION, self._clock)
            await outage.ask(read, _WhileOthersCan(url, self.group))
        else:
            await self._outlasting(self._alone[url], read)

    async def generate_on(
        self, url: str, prompts: list[list[int]], sampling: RolloutSampling
    ) -> list[RolloutCompletion]:
        """Complete a few prompts on one server, without retries: what a canary needs.

        Raises:
            InputError, PeerError: as of `generate`.
        """
        check_spellable("sampling", sampling.model_dump())
        body = {"prompts": prompts_of_ids(prompts), "sampling": sampling.model_dump(), "run": self.run}
        outage = Outage(self._alone[url], self._TIMEOUT_OPTION, self._clock)
        completions: list[RolloutCompletion] = []

        async def read(base: str) -> None:
            await self._read_completions(base, body, len(prompts), 1, completions.append, may_break=False)

        await outage.ask(read, Attempts(1, self._TIMEOUT_OPTION))
        return sorted(completions, key=lambda c: c.prompt_index)

    async def _read_completions(
        self,
        url: str,
        body: dict[str, Any],
        prompts: int,
        samples: int,
        on_completion: _OnCompletion,
        *,
        may_break: bool,
    ) -> None:
        """The completions of a request as they arrive; those before a break where it `may_break` and there are any.

        For a run what cannot be used is left out, and the rest read all the same.

        Raises:
            PeerError: the server sent others than it was asked for, or broke off by its own word.
        """
        missing = {(prompt, sample) for prompt in range(prompts) for sample in range(samples)}
        problems: list[PeerError] = []
        try:
            async for document in self._stream(url, body):
                try:
                    completion = _read(url, document, missing)
                    on_completion(completion)
                    missing.remove((completion.prompt_index, completion.sample_index))
                except _UnusableError as error:
                    problems.append(error)
                    if self.group.labels is None:
                        raise
        except httpx.RequestError as error:
            num_arrived = prompts * samples - len(missing)
            if not (num_arrived and may_break and may_pass(error)):
                raise
            text = "%s broke off after %d of %d completions; the others are asked again"
            logger.warning(text, url, num_arrived, prompts * samples)
        except PeerError as error:
            raise (problems or [error])[0] from None  # the server's own words, before it broke off
        else:
            if problems:
                raise problems[0]
            if missing:
                raise PeerError(f"{url} sent {prompts * samples - len(missing)} of {prompts * samples} completions")

    async def _stream(self, url: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self._check_open()
        async with self._http.stream("POST", f"{url}/v1/rollouts", json=body, timeout=self._patience()) as response:
            if not response.is_success:
                await response.aread()
                self._raise_for_problem(response)
            self._reached = True
            async for document in read_frames(response.aiter_bytes()):
                yield document

    def _patience(self) -> httpx.Timeout:
        """How long a server may be silent: where others can do its work, little longer than a living one is."""
        usual = self._http.timeout
        if len(self.group.live) < 2 or usual.read is None:
            return usual
        most = min(_SILENCE_S, usual.read)
        return httpx.Timeout(connect=usual.connect, read=most, write=most, pool=usual.pool)


def _read(url: str, document: bytes, missing: Collection[tuple[int, int]]) -> RolloutCompletion:
    """A completion that was asked for.

    Raises:
        _UnusableError: it is none, or was not.
    """
    try:
        completion = decode_completion(document)
    except Exception as error:  # whatever is wrong with it, it costs itself alone
        raise _UnusableError(f"{url}: {error}") from error
    where = completion.prompt_index, completion.sample_index
    if where not in missing:
        raise _UnusableError(f"{url} sent sample {where[1]} of prompt {where[0]} twice, or unasked")
    return completion


async def _cancel(tasks: Iterable["asyncio.Task[None]"]) -> None:
    """End tasks whose results nobody wants."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # asyncio prints one that nobody has asked for
