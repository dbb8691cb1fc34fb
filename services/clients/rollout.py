"""The client of the rollout servers."""

import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx

from services.clients.arguments import check_spellable, integer, prompts_of_ids
from services.clients.base import ServerClient, all_or_first_error
from services.clients.outage import Attempts, Outage, may_pass
from services.config.own_key import OwnKeyAuth
from services.errors import PeerError, ProblemError
from services.wire.frames import read_frames
from services.wire.rollout import (
    MAX_IDS_PER_REQUEST,
    RolloutCompletion,
    RolloutInfo,
    RolloutSampling,
    decode_completion,
)

logger = logging.getLogger(__name__)

# Of one request: enough to keep the queue of an engine full, few enough to be asked again when a connection breaks.
_COMPLETIONS_PER_REQUEST = 4096
_TOO_LARGE = 413

_OnCompletion = Callable[[RolloutCompletion], None]


@dataclass(frozen=True)
class _Request:
    """Samples `first_sample` up to `first_sample + num_samples` of some of the prompts of a call."""

    prompt_indices: list[int]
    """Of its prompts among those of the call."""
    first_sample: int
    num_samples: int

    def without(self, received: Collection[tuple[int, int]]) -> list["_Request"]:
        """Requests for what is not among the (prompt_index, sample) `received`; prompts that lack the same samples share one."""
        missing: dict[tuple[int, int], list[int]] = {}
        samples = range(self.first_sample, self.first_sample + self.num_samples)
        for prompt_index in self.prompt_indices:
            for run in _runs([sample for sample in samples if (prompt_index, sample) not in received]):
                missing.setdefault(run, []).append(prompt_index)
        return [_Request(prompt_indices, first, num) for (first, num), prompt_indices in missing.items()]

    def halves(self) -> list["_Request"]:
        """Two requests for the same completions; none when it is for a single one."""
        if len(self.prompt_indices) > 1:
            middle = len(self.prompt_indices) // 2
            return [
                replace(self, prompt_indices=self.prompt_indices[:middle]),
                replace(self, prompt_indices=self.prompt_indices[middle:]),
            ]
        if self.num_samples == 1:
            return []
        middle = self.num_samples // 2
        rest = replace(self, first_sample=self.first_sample + middle, num_samples=self.num_samples - middle)
        return [replace(self, num_samples=middle), rest]


@dataclass(frozen=True)
class _Work:
    """The work of one call of `generate`."""

    prompts: list[list[int]]
    sampling: RolloutSampling
    student_top_k: int
    run: str | None

    def body(self, request: _Request) -> dict[str, Any]:
        # The server adds its own sample index to the seed, counted from 0 in every request.
        seed = None if self.sampling.seed is None else self.sampling.seed + request.first_sample
        return {
            "prompts": [self.prompts[prompt_index] for prompt_index in request.prompt_indices],
            "samples_per_prompt": request.num_samples,
            "sampling": self.sampling.model_dump() | {"seed": seed},
            "student_top_k": self.student_top_k,
            "run": self.run,
        }


class RolloutClient(ServerClient):
    """The rollout servers: completions of the student under the weights they hold.

    A server that is down, full or slow is asked again for `outage_s`, for what has not arrived of its share. One that was
    started again answers under the version "default": whose a completion is, its `policy_versions` say, and whoever trains
    on it must ask.
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

    async def info(self) -> list[RolloutInfo]:
        """One answer per server, in the order of the URLs."""

        async def ask(url: str) -> RolloutInfo:
            return await self._get_info(f"{url}/v1/rollouts/info", RolloutInfo)

        infos = await all_or_first_error([self._retrying(url, ask) for url in self.urls])
        for url, info in zip(self.urls, infos, strict=True):
            self._limits[url] = min(_COMPLETIONS_PER_REQUEST, info.max_completions_per_request)
        return infos

    async def generate(
        self,
        prompts: list[list[int]],
        sampling: RolloutSampling,
        samples_per_prompt: int = 1,
        student_top_k: int = 0,
        on_completion: _OnCompletion = lambda completion: None,
    ) -> list[RolloutCompletion]:
        """Complete any number of prompts, spread evenly over the servers.

        A server gets one request after the other: two at once would only wait in its queue until they time out. What it
        calls too large (413) is cut further, and what arrived before a connection broke is kept.

        Args:
            prompts: token ids of each; numpy arrays and torch tensors of integers will do.
            on_completion: called with each as it arrives, in the event loop; what it raises ends the call.

        Returns:
            Completions ordered by prompt_index, then sample_index, both those of this call.

        Raises:
            InputError: there is no prompt, one is empty, or ids are no whole numbers; nothing was sent.
            PeerError: a server did not answer for `outage_s`, or refused; the others are no longer asked.
        """
        work = _Work(prompts_of_ids(prompts), sampling, integer("student_top_k", student_top_k, at_least=0), self.run)
        samples = integer("samples_per_prompt", samples_per_prompt, at_least=1)
        check_spellable("sampling", sampling.model_dump())
        lengths = [len(prompt) for prompt in work.prompts]

        async def share(server: int) -> list[RolloutCompletion]:
            url, prompt_indices = self.urls[server], list(range(server, len(lengths), len(self.urls)))
            requests = list(_cut(prompt_indices, lengths, samples, self._limits[url]))
            return await self._complete(url, requests, work, on_completion)

        shares = await all_or_first_error([share(server) for server in range(len(self.urls))])
        completions = [completion for part in shares for completion in part]
        return sorted(completions, key=lambda c: (c.prompt_index, c.sample_index))

    async def _complete(
        self, url: str, requests: list[_Request], work: _Work, on_completion: _OnCompletion
    ) -> list[RolloutCompletion]:
        """The completions of some requests, one after the other; only what has not arrived is asked again."""
        received: dict[tuple[int, int], RolloutCompletion] = {}
        left = requests[::-1]
        while left:
            request = left.pop()
            try:
                for completion in await self._ask(url, request, work, on_completion):
                    received[completion.prompt_index, completion.sample_index] = completion
                parts = request.without(received)
            except ProblemError as error:
                parts = request.halves() if error.status == _TOO_LARGE else []
                if not parts:
                    raise
            left += reversed(parts)
        return list(received.values())

    async def _ask(
        self, url: str, request: _Request, work: _Work, on_completion: _OnCompletion
    ) -> list[RolloutCompletion]:
        """What arrives of a request, at least one completion, numbered among the prompts and samples of the call."""
        arrived: list[RolloutCompletion] = []

        def arrive(completion: RolloutCompletion) -> None:
            arrived.append(
                replace(
                    completion,
                    prompt_index=request.prompt_indices[completion.prompt_index],
                    sample_index=request.first_sample + completion.sample_index,
                )
            )
            on_completion(arrived[-1])

        async def read(base: str) -> None:
            body, num_prompts = work.body(request), len(request.prompt_indices)
            await self._read_completions(base, body, num_prompts, request.num_samples, arrive)

        await self._outlasting(self._alone[url], read)
        return arrived

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
        may_break: bool = True,
    ) -> None:
        """The completions of a request as they arrive; those before a break where it `may_break` and there are any.

        Raises:
            PeerError: the server sent others than it was asked for, or broke off by its own word.
        """
        missing = {(prompt, sample) for prompt in range(prompts) for sample in range(samples)}
        try:
            async for completion in self._stream(url, body):
                where = completion.prompt_index, completion.sample_index
                if where not in missing:
                    raise PeerError(f"{url} sent sample {where[1]} of prompt {where[0]} twice, or unasked")
                missing.remove(where)
                on_completion(completion)
        except httpx.RequestError as error:
            num_arrived = prompts * samples - len(missing)
            if not (num_arrived and may_break and may_pass(error)):
                raise
            text = "%s broke off after %d of %d completions; the others are asked again"
            logger.warning(text, url, num_arrived, prompts * samples)
        else:
            if missing:
                raise PeerError(f"{url} sent {prompts * samples - len(missing)} of {prompts * samples} completions")

    async def _stream(self, url: str, body: dict[str, Any]) -> AsyncIterator[RolloutCompletion]:
        self._check_open()
        async with self._http.stream("POST", f"{url}/v1/rollouts", json=body) as response:
            if not response.is_success:
                await response.aread()
                self._raise_for_problem(response)
            self._reached = True
            async for document in read_frames(response.aiter_bytes()):
                yield decode_completion(document)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """(first, how many) of each run of consecutive numbers, which rise."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _cut(prompt_indices: list[int], lengths: list[int], samples: int, limit: int) -> Iterator[_Request]:
    """Requests of at most `limit` completions and a bounded number of ids; a longer prompt stands alone.

    Args:
        lengths: of all prompts of the call, tokens.
    """
    taken: list[int] = []
    num_ids = 0
    for prompt_index in prompt_indices:
        if taken and ((len(taken) + 1) * samples > limit or num_ids + lengths[prompt_index] > MAX_IDS_PER_REQUEST):
            yield from _cut_samples(taken, samples, limit)
            taken, num_ids = [], 0
        taken.append(prompt_index)
        num_ids += lengths[prompt_index]
    if taken:
        yield from _cut_samples(taken, samples, limit)


def _cut_samples(prompt_indices: list[int], samples: int, limit: int) -> Iterator[_Request]:
    for first in range(0, samples, limit):  # more than one for a single prompt with more samples than `limit`
        yield _Request(prompt_indices, first, min(limit, samples - first))
