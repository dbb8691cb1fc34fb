"""The client of the rollout servers."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx

from services.clients.arguments import check_spellable, integer, prompts_of_ids
from services.clients.base import ServerClient, all_or_first_error
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

# Of one request: enough to keep the queue of an engine full, few enough to be asked again when a connection breaks.
_COMPLETIONS_PER_REQUEST = 4096
_TOO_LARGE = 413


@dataclass(frozen=True)
class _Request:
    """Samples `first_sample` up to `first_sample + num_samples` of some of the prompts of a call."""

    places: list[int]
    """Of its prompts among those of the call."""
    first_sample: int
    num_samples: int

    def halves(self) -> tuple["_Request", "_Request"] | None:
        """Two requests for the same completions; None when it is for a single one."""
        if len(self.places) > 1:
            middle = len(self.places) // 2
            return replace(self, places=self.places[:middle]), replace(self, places=self.places[middle:])
        if self.num_samples == 1:
            return None
        middle = self.num_samples // 2
        rest = replace(self, first_sample=self.first_sample + middle, num_samples=self.num_samples - middle)
        return replace(self, num_samples=middle), rest


class RolloutClient(ServerClient):
    """The rollout servers: completions of the student under the weights they hold."""

    _KEYLESS_AUTH = OwnKeyAuth()
    _SERVER = "a distillserve rollout server"
    _SECTION = "rollout_client"
    _TIMEOUT_OPTION = "rollout_client.request_timeout_s (of a client in Python: timeout_s)"

    def __init__(self, urls: list[str], **options: Any) -> None:
        super().__init__(urls, **options)
        self._limits = dict.fromkeys(self.urls, _COMPLETIONS_PER_REQUEST)
        self.run: str | None = None
        """The run whose completions these are; the servers then refuse (409) what is asked once they are another's."""

    async def info(self) -> list[RolloutInfo]:
        """One answer per server, in the order of the URLs."""
        infos = await all_or_first_error([self._get_info(f"{url}/v1/rollouts/info", RolloutInfo) for url in self.urls])
        for url, info in zip(self.urls, infos, strict=True):
            self._limits[url] = min(_COMPLETIONS_PER_REQUEST, info.max_completions_per_request)
        return infos

    async def generate(
        self, prompts: list[list[int]], sampling: RolloutSampling, samples_per_prompt: int = 1, student_top_k: int = 0
    ) -> list[RolloutCompletion]:
        """Complete any number of prompts, spread evenly over the servers.

        A server gets one request after the other: two at once would only wait in its queue until they time out. What it
        calls too large (413) is cut further.

        Args:
            prompts: token ids of each; numpy arrays and torch tensors of integers will do.

        Returns:
            Completions ordered by prompt_index, then sample_index, both those of this call.

        Raises:
            InputError: there is no prompt, one is empty, or ids are no whole numbers; nothing was sent.
            PeerError: a server failed more often than there are attempts; the others are no longer asked.
        """
        asked = prompts_of_ids(prompts)
        samples = integer("samples_per_prompt", samples_per_prompt, at_least=1)
        top_k = integer("student_top_k", student_top_k, at_least=0)
        check_spellable("sampling", sampling.model_dump())

        async def complete(url: str, request: _Request) -> list[RolloutCompletion]:
            try:
                return await self._complete(url, request, asked, sampling, top_k)
            except ProblemError as error:
                halves = request.halves()
                if error.status != _TOO_LARGE or halves is None:
                    raise
                return [completion for half in halves for completion in await complete(url, half)]

        async def share(server: int) -> list[RolloutCompletion]:
            url, places = self.urls[server], list(range(server, len(asked), len(self.urls)))
            requests = _cut(places, [len(prompt) for prompt in asked], samples, self._limits[url])
            return [completion for request in requests for completion in await complete(url, request)]

        shares = await all_or_first_error([share(server) for server in range(len(self.urls))])
        completions = [completion for part in shares for completion in part]
        return sorted(completions, key=lambda c: (c.prompt_index, c.sample_index))

    async def _complete(
        self, url: str, request: _Request, prompts: list[list[int]], sampling: RolloutSampling, top_k: int
    ) -> list[RolloutCompletion]:
        # The server adds its own sample index to the seed, counted from 0 in every request.
        seed = None if sampling.seed is None else sampling.seed + request.first_sample
        body = {
            "prompts": [prompts[place] for place in request.places],
            "samples_per_prompt": request.num_samples,
            "sampling": sampling.model_dump() | {"seed": seed},
            "student_top_k": top_k,
            "run": self.run,
        }
        frames = await self._retrying(lambda: self._read_completions(url, body))
        _check_complete(url, frames, len(request.places), request.num_samples)
        return [
            replace(
                frame,
                prompt_index=request.places[frame.prompt_index],
                sample_index=request.first_sample + frame.sample_index,
            )
            for frame in frames
        ]

    async def generate_on(
        self, url: str, prompts: list[list[int]], sampling: RolloutSampling
    ) -> list[RolloutCompletion]:
        """Complete a few prompts on one server, without retries: what a canary needs.

        Raises:
            InputError, PeerError: as of `generate`.
        """
        check_spellable("sampling", sampling.model_dump())
        body = {"prompts": prompts_of_ids(prompts), "sampling": sampling.model_dump(), "run": self.run}
        started = time.monotonic()
        try:
            completions = await self._read_completions(url, body)
        except httpx.RequestError as error:
            raise self._unanswered(error, 1, time.monotonic() - started) from error
        _check_complete(url, completions, len(prompts), 1)
        return sorted(completions, key=lambda c: c.prompt_index)

    async def _read_completions(self, url: str, body: dict[str, Any]) -> list[RolloutCompletion]:
        self._check_open()
        async with self._http.stream("POST", f"{url}/v1/rollouts", json=body) as response:
            if not response.is_success:
                await response.aread()
                self._raise_for_problem(response)
            return [decode_completion(document) async for document in read_frames(response.aiter_bytes())]


def _check_complete(url: str, completions: list[RolloutCompletion], prompts: int, samples: int) -> None:
    got = sorted((c.prompt_index, c.sample_index) for c in completions)
    if got != [(prompt, sample) for prompt in range(prompts) for sample in range(samples)]:
        raise PeerError(
            f"{url} sent {len(got)} completions, not exactly one for each of {prompts} prompts x {samples} samples"
        )


def _cut(places: list[int], lengths: list[int], samples: int, limit: int) -> Iterator[_Request]:
    """Requests of at most `limit` completions and a bounded number of ids; a longer prompt stands alone.

    Args:
        lengths: of all prompts of the call, tokens.
    """
    taken: list[int] = []
    num_ids = 0
    for place in places:
        if taken and ((len(taken) + 1) * samples > limit or num_ids + lengths[place] > MAX_IDS_PER_REQUEST):
            yield from _cut_samples(taken, samples, limit)
            taken, num_ids = [], 0
        taken.append(place)
        num_ids += lengths[place]
    if taken:
        yield from _cut_samples(taken, samples, limit)


def _cut_samples(places: list[int], samples: int, limit: int) -> Iterator[_Request]:
    for first in range(0, samples, limit):  # more than one for a single prompt with more samples than `limit`
        yield _Request(places, first, min(limit, samples - first))
