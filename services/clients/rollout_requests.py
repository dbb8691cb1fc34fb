"""What a call for completions consists of: requests, how they are cut and dealt to servers, what has arrived.

A request is for the same samples of some prompts. What a server has not answered of one is one or more requests again.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from services.wire.rollout import MAX_IDS_PER_REQUEST, RolloutCompletion, RolloutSampling

_MOST_FAILURES = 3
"""Answers for one request that cannot be used, after which it is given up."""


@dataclass(frozen=True)
class Failure:
    """Of a server to answer a request usably."""

    url: str
    reason: str

    @property
    def what(self) -> str:
        """The reason without the server."""
        return self.reason.replace(self.url, "")


@dataclass(frozen=True)
class Request:
    """Samples `first_sample` up to `first_sample + num_samples` of some of the prompts of a call."""

    prompt_indices: list[int]
    """Of its prompts among those of the call."""
    first_sample: int
    num_samples: int
    failures: tuple[Failure, ...] = ()

    def __len__(self) -> int:
        """Number of completions."""
        return len(self.prompt_indices) * self.num_samples

    def without(self, received: Collection[tuple[int, int]]) -> list["Request"]:
        """Requests for what is not among the (prompt_index, sample) `received`; prompts that lack the same samples share one."""
        missing: dict[tuple[int, int], list[int]] = {}
        samples = range(self.first_sample, self.first_sample + self.num_samples)
        for prompt_index in self.prompt_indices:
            for run in _runs([sample for sample in samples if (prompt_index, sample) not in received]):
                missing.setdefault(run, []).append(prompt_index)
        return [Request(prompt_indices, first, num, self.failures) for (first, num), prompt_indices in missing.items()]

    def halves(self) -> list["Request"]:
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

    def is_hopeless(self, live: Collection[str]) -> bool:
        """Whether asking once more is of no use: often enough, or alike by every server there is."""
        if len(self.failures) >= _MOST_FAILURES:
            return True
        is_alike = len(self.failures) > 1 and len({failure.what for failure in self.failures}) == 1
        return is_alike and {failure.url for failure in self.failures}.issuperset(live)


@dataclass(frozen=True)
class Work:
    """The work of one call of `generate`."""

    prompts: list[list[int]]
    sampling: RolloutSampling
    student_top_k: int
    run: str | None

    def body(self, request: Request) -> dict[str, Any]:
        # The server adds its own sample index to the seed, counted from 0 in every request.
        seed = None if self.sampling.seed is None else self.sampling.seed + request.first_sample
        return {
            "prompts": [self.prompts[prompt_index] for prompt_index in request.prompt_indices],
            "samples_per_prompt": request.num_samples,
            "sampling": self.sampling.model_dump() | {"seed": seed},
            "student_top_k": self.student_top_k,
            "run": self.run,
        }


@dataclass
class Share:
    """What one server is asked, one request after the other.

    Attributes:
        left: not asked yet, the next one last.
        current: asked now.
        asked_at: when, by the clock of the client, seconds.
        num_tokens: that have arrived.
    """

    url: str
    left: list[Request]
    current: Request | None = None
    asked_at: float | None = None
    num_tokens: int = 0

    def missing(self, received: Mapping[tuple[int, int], RolloutCompletion]) -> list[Request]:
        """Requests for what has not arrived."""
        return [*([] if self.current is None else self.current.without(received)), *self.left]

    def has_failed(self, received: Mapping[tuple[int, int], RolloutCompletion], reason: str) -> list[Request]:
        """As `missing`, once the current request was answered in a way that is of no use."""
        if self.current is not None:
            failures = (*self.current.failures, Failure(self.url, reason))
            self.current = replace(self.current, failures=failures)
        return self.missing(received)


@dataclass
class Deal:
    """Prompts dealt to servers in proportion to their weights, of one call; equal ones get a prompt each in turn."""

    lengths: Sequence[int]
    """Of all prompts of the call, tokens."""
    _credits: dict[str, float] = field(default_factory=dict)

    def shares(self, requests: list[Request], weights: Mapping[str, float], limits: Mapping[str, int]) -> list[Share]:
        """One share for each server that gets something.

        Args:
            weights: of the servers to ask, by URL.
            limits: how many completions each takes at once.
        """
        dealt: dict[str, list[Request]] = {}
        for request in requests:
            failed = {failure.url for failure in request.failures}
            able = [url for url in weights if url not in failed] or list(weights)
            places: dict[str, list[int]] = {}
            for prompt_index in request.prompt_indices:
                places.setdefault(self._next(able, weights), []).append(prompt_index)
            for url, prompt_indices in places.items():
                part = replace(request, prompt_indices=prompt_indices)
                dealt.setdefault(url, []).extend(_cut(part, self.lengths, limits[url]))
        return [Share(url, requests[::-1]) for url, requests in dealt.items()]

    def _next(self, urls: list[str], weights: Mapping[str, float]) -> str:
        """Smooth weighted round robin: the server that is furthest behind what it should have had."""
        for url in urls:
            self._credits[url] = self._credits.get(url, 0.0) + weights[url]
        chosen = max(urls, key=lambda url: self._credits[url])
        self._credits[chosen] -= sum(weights[url] for url in urls)
        return chosen


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """(first, how many) of each run of consecutive numbers, which rise."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _cut(request: Request, lengths: Sequence[int], limit: int) -> Iterator[Request]:
    """Requests of at most `limit` completions and a bounded number of ids; a longer prompt stands alone."""
    taken: list[int] = []
    num_ids = 0
    for index in request.prompt_indices:
        is_full = (len(taken) + 1) * request.num_samples > limit or num_ids + lengths[index] > MAX_IDS_PER_REQUEST
        if taken and is_full:
            yield from _cut_samples(replace(request, prompt_indices=taken), limit)
            taken, num_ids = [], 0
        taken.append(index)
        num_ids += lengths[index]
    if taken:
        yield from _cut_samples(replace(request, prompt_indices=taken), limit)


def _cut_samples(request: Request, limit: int) -> Iterator[Request]:
    """More than one for a single prompt with more samples than `limit`."""
    end = request.first_sample + request.num_samples
    for first in range(request.first_sample, end, limit):
        yield replace(request, first_sample=first, num_samples=min(limit, end - first))
