"""Typed clients of the two servers, over httpx: split timeouts, retries that respect Retry-After, problem documents.

Retried are 408, 429, 5xx and transport errors, with jitter; never another 4xx: the same request would be
refused again. Loads neither torch nor vllm. Weight control is services/weight_transfer/control.py.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Self, TypeVar

import httpx
import numpy as np
import stamina
from pydantic import TypeAdapter, ValidationError

from services.errors import PeerError, ProblemError
from services.schemas import RolloutCompletion, RolloutInfo, RolloutSampling, TeacherInfo, TeacherScores
from services.wire import SAFETENSORS_MEDIA_TYPE, decode_completion, decode_scores, read_frames

Info = TypeVar("Info")
Answer = TypeVar("Answer")
Sequence = tuple[list[int], int]
"""Token ids of prompt and completion, and the prompt's length."""

_CONNECT_TIMEOUT_S = 10.0
# Score requests under way at once, for each server: enough to keep it busy, few enough to leave its queue to others.
_SCORES_IN_FLIGHT = 8
_TOO_LARGE = 413
_POLL_S = 0.25


class ServerClient:
    """What both clients share: one connection pool, the key, retries, errors.

    Args:
        urls: base URLs of equal servers; work is spread over them.
        key: bearer token, if the servers ask for one.
        timeout_s: how long to wait for an answer to begin, and between its parts.
        attempts: tries of one request, the first included.
        transport: replaces the network in tests.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        key: str | None = None,
        timeout_s: float = 300.0,
        attempts: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self._attempts = attempts
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=256),
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def wait_ready(self, timeout_s: float, on_wait: Callable[[str], None] | None = None) -> None:
        """Wait until every server answers /ready.

        Args:
            on_wait: called once per server that is not ready at first, with its URL.

        Raises:
            PeerError: one is not ready after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        for url in self.urls:
            announced = False
            while (problem := await self._readiness_problem(url)) is not None:
                if time.monotonic() > deadline:
                    raise PeerError(f"{url} is not ready after {timeout_s:.0f} s: {problem}")
                if on_wait is not None and not announced:
                    on_wait(url)
                    announced = True
                await asyncio.sleep(_POLL_S)

    async def _readiness_problem(self, url: str) -> str | None:
        try:
            response = await self._http.get(f"{url}/ready", timeout=_CONNECT_TIMEOUT_S)
        except httpx.TransportError as error:
            return f"{type(error).__name__} {error}".strip()
        return None if response.is_success else f"it answers {response.status_code}"

    async def _get_info(self, path: str, kind: type[Info]) -> list[Info]:
        async def one(url: str) -> Info:
            response = await self._retrying(lambda: self._send("GET", f"{url}{path}"))
            try:
                return TypeAdapter(kind).validate_json(response.content)
            except ValidationError as error:
                raise PeerError(f"{url}{path} is not a {kind.__name__}: {error.errors()[0]['msg']}") from error

        return list(await asyncio.gather(*(one(url) for url in self.urls)))

    async def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        response = await self._http.request(method, url, **options)
        raise_for_problem(response)
        return response

    async def _retrying(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Run `call`, again after errors that may pass.

        Raises:
            PeerError: the last attempt's error.
        """
        try:
            async for attempt in stamina.retry_context(
                on=wait_before_retry, attempts=self._attempts, timeout=None, wait_initial=0.2, wait_max=10.0
            ):
                with attempt:
                    return await call()
        except httpx.TransportError as error:
            url = error.request.url if error._request is not None else self.urls
            raise PeerError(f"{url} cannot be reached: {type(error).__name__} {error}".strip()) from error
        raise AssertionError("unreachable: stamina either returns or raises")


def raise_for_problem(response: httpx.Response) -> None:
    """Turn an error answer into a ProblemError; the body must have been read.

    Raises:
        ProblemError: the status is not 2xx.
    """
    if response.is_success:
        return
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    problem.setdefault("detail", response.text[:300])
    error = ProblemError(str(response.request.url), response.status_code, problem)
    error.retry_after_s = _seconds(response.headers.get("Retry-After"))
    raise error


def wait_before_retry(error: Exception) -> bool | float:
    """False: do not retry; True: after stamina's own backoff; a number: after that many seconds."""
    if isinstance(error, ProblemError):
        if error.status not in (408, 429) and error.status < 500:
            return False
        # A little jitter, so that clients that were refused together do not return together.
        return True if error.retry_after_s is None else error.retry_after_s * random.uniform(1.0, 1.25)
    return isinstance(error, httpx.TransportError)


def _seconds(header: str | None) -> float | None:
    try:
        seconds = float(header or "nan")
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


class RolloutClient(ServerClient):
    """The rollout servers: completions of the student under the weights they hold."""

    async def info(self) -> list[RolloutInfo]:
        """One answer per server, in the order of the URLs."""
        return await self._get_info("/v1/rollouts/info", RolloutInfo)

    async def generate(
        self, prompts: list[list[int]], sampling: RolloutSampling, samples_per_prompt: int = 1, student_top_k: int = 0
    ) -> list[RolloutCompletion]:
        """Complete prompts, spread evenly over the servers.

        Returns:
            Completions ordered by prompt_index, then sample_index.

        Raises:
            PeerError: a server failed more often than there are attempts.
        """

        async def share(server: int) -> list[RolloutCompletion]:
            indices = range(server, len(prompts), len(self.urls))
            if not indices:
                return []
            body = {
                "prompts": [prompts[index] for index in indices],
                "samples_per_prompt": samples_per_prompt,
                "sampling": sampling.model_dump(),
                "student_top_k": student_top_k,
            }
            frames = await self._retrying(lambda: self._read_completions(self.urls[server], body))
            _check_complete(self.urls[server], frames, len(indices), samples_per_prompt)
            return [_with_prompt_index(frame, indices[frame.prompt_index]) for frame in frames]

        shares = await asyncio.gather(*(share(server) for server in range(len(self.urls))))
        completions = [completion for part in shares for completion in part]
        return sorted(completions, key=lambda c: (c.prompt_index, c.sample_index))

    async def generate_on(
        self, url: str, prompts: list[list[int]], sampling: RolloutSampling
    ) -> list[RolloutCompletion]:
        """Complete prompts on one server, without retries: what a canary needs."""
        body = {"prompts": prompts, "sampling": sampling.model_dump()}
        try:
            completions = await self._read_completions(url, body)
        except httpx.TransportError as error:
            raise PeerError(f"{url} cannot be reached: {type(error).__name__} {error}".strip()) from error
        return sorted(completions, key=lambda c: c.prompt_index)

    async def _read_completions(self, url: str, body: dict[str, Any]) -> list[RolloutCompletion]:
        async with self._http.stream("POST", f"{url}/v1/rollouts", json=body) as response:
            if not response.is_success:
                await response.aread()
                raise_for_problem(response)
            return [decode_completion(document) async for document in read_frames(response.aiter_bytes())]


def _check_complete(url: str, completions: list[RolloutCompletion], prompts: int, samples: int) -> None:
    got = sorted((c.prompt_index, c.sample_index) for c in completions)
    if got != [(prompt, sample) for prompt in range(prompts) for sample in range(samples)]:
        raise PeerError(
            f"{url} sent {len(got)} completions, not exactly one for each of {prompts} prompts x {samples} samples"
        )


def _with_prompt_index(completion: RolloutCompletion, prompt_index: int) -> RolloutCompletion:
    return RolloutCompletion(**{**vars(completion), "prompt_index": prompt_index})


class TeacherClient(ServerClient):
    """The teacher servers, equal replicas: logprobs of given completions."""

    async def info(self) -> list[TeacherInfo]:
        """One answer per server, in the order of the URLs."""
        return await self._get_info("/v1/teacher/info", TeacherInfo)

    async def vocabulary(self) -> dict[str, int]:
        """The first teacher's token-to-id map, for saying how two tokenizers differ."""
        response = await self._retrying(lambda: self._send("GET", f"{self.urls[0]}/v1/teacher/vocabulary"))
        return response.json()

    async def score(
        self,
        sequences: list[Sequence],
        *,
        top_k: int,
        temperature: float = 1.0,
        support_ids: list[list[list[int]]] | None = None,
        max_rows_per_request: int | None = None,
    ) -> TeacherScores:
        """Score completions, spread over the replicas; when one of them fails, the others take over.

        Args:
            sequences: (token ids of prompt and completion, length of the prompt).
            top_k: candidates per row.
            support_ids: of each sequence, [rows][M] further token ids to score.
            max_rows_per_request: cut the work into requests of about this many rows; default: one per replica.
                What a server calls too large (413) is cut further.

        Raises:
            PeerError: a teacher failed more often than there are attempts, its answer has the wrong shape, or
                the replicas do not serve the same model.
        """
        num_rows = [len(ids) - prompt_length for ids, prompt_length in sequences]
        limit = max_rows_per_request or -(-sum(num_rows) // len(self.urls))
        parts = cut_by_rows(num_rows, limit)

        room = asyncio.Semaphore(_SCORES_IN_FLIGHT * len(self.urls))

        async def one(index: int, part: slice) -> list[TeacherScores]:
            asked = [{"token_ids": ids, "prompt_length": length} for ids, length in sequences[part]]
            if support_ids is not None:
                asked = [{**s, "support_ids": ids} for s, ids in zip(asked, support_ids[part], strict=True)]
            body = {"sequences": asked, "top_k": top_k, "temperature": temperature}
            try:
                async with room:
                    url, scores = await self._score_on(index, body)
            except ProblemError as error:
                if error.status != _TOO_LARGE or len(asked) == 1:
                    raise
                middle = (part.start + part.stop) // 2
                halves = slice(part.start, middle), slice(middle, part.stop)
                return [scores for half in halves for scores in await one(index, half)]
            width = None if support_ids is None else len(support_ids[part.start][0])
            _check_shape(url, scores, num_rows[part], top_k, width)
            return [scores]

        pieces = await asyncio.gather(*(one(i, part) for i, part in enumerate(parts)))
        return concatenate_scores(list(itertools.chain.from_iterable(pieces)))

    async def _score_on(self, index: int, body: dict[str, Any]) -> tuple[str, TeacherScores]:
        """(URL, answer) of the replica `index`, or after two failures there of those that follow it."""
        attempts = itertools.count(-1)

        async def send() -> tuple[str, TeacherScores]:
            url = f"{self.urls[(index + max(0, next(attempts))) % len(self.urls)]}/v1/teacher/logprobs"
            response = await self._send("POST", url, json=body, headers={"Accept": SAFETENSORS_MEDIA_TYPE})
            try:
                return url, decode_scores(response.content)
            except PeerError as error:
                raise PeerError(f"{url}: {error}") from error

        return await self._retrying(send)


def cut_by_rows(num_rows: list[int], limit: int) -> list[slice]:
    """Consecutive slices of sequences with at most `limit` rows each; a longer sequence stands alone."""
    slices, start, rows = [], 0, 0
    for index, count in enumerate(num_rows):
        if index > start and rows + count > limit:
            slices.append(slice(start, index))
            start, rows = index, 0
        rows += count
    return [*slices, slice(start, len(num_rows))]


def _check_shape(url: str, scores: TeacherScores, num_rows: list[int], top_k: int, support: int | None) -> None:
    total = sum(num_rows)
    expected = np.concatenate([[0], np.cumsum(num_rows)])
    if not np.array_equal(scores.row_offsets, expected):
        raise PeerError(
            f"{url} scored {len(scores.token_logprobs)} rows where {total} were asked, or cut them differently"
        )
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("token_logprobs", "tail_logprobs", "entropies"), (total,))
    shapes |= dict.fromkeys(("topk_ids", "topk_logprobs"), (total, top_k))
    if support is not None:
        shapes |= {"support_logprobs": (total, support), "support_tail_logprobs": (total,)}
    for name, shape in shapes.items():
        array = getattr(scores, name)
        if array is None or array.shape != shape:
            raise PeerError(f"{url} sent {name} of shape {None if array is None else array.shape}, expected {shape}")


def concatenate_scores(parts: list[TeacherScores]) -> TeacherScores:
    """One answer from the answers to consecutive slices.

    Raises:
        PeerError: they come from different models.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({part.fingerprint for part in parts}) > 1:
        models = ", ".join(sorted({f"{part.model} ({part.fingerprint})" for part in parts}))
        raise PeerError(f"the teachers do not serve the same model: {models}")
    lengths = np.concatenate([np.diff(part.row_offsets) for part in parts])
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in first.columns()
    }
    return replace(first, row_offsets=np.concatenate([[0], np.cumsum(lengths)]), **columns)
