"""The client of the teacher servers: work cut to size, spread over replicas, asked again through an outage."""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import httpx
import numpy as np

from services.errors import PeerError, ProblemError
from services.replicas import Lease, Replicas
from services.schemas import TeacherInfo, TeacherScores
from services.server_client import Answer, ServerClient, describe_transport_error, may_pass
from services.wire import SAFETENSORS_MEDIA_TYPE, decode_scores

Sequence = tuple[list[int], int]
"""Token ids of prompt and completion, and the prompt's length."""

# Score requests under way at once, for each server: enough to keep it busy, few enough to leave its queue to others.
_SCORES_IN_FLIGHT = 8
_TOO_LARGE = 413
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 10.0


class TeacherClient(ServerClient):
    """The teacher servers, equal replicas: logprobs of given completions.

    Each request goes to the replica with the fewest of ours in flight, and to the next one when that fails; what is
    retried is 408, 429, 5xx and transport errors. Scoring is pure: asking twice is safe.

    Args:
        urls: base URLs of the replicas.
        key: bearer token, if the servers ask for one.
        timeout_s: how long to wait for an answer to begin, and between its parts.
        outage_s: how long a score request is asked again while no replica answers it, counted from its first failure.
        attempts: tries of the other requests, the first included.
        transport, clock: replace the network and the time in tests.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        key: str | None = None,
        timeout_s: float = 300.0,
        outage_s: float = 300.0,
        attempts: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(urls, key=key, timeout_s=timeout_s, attempts=attempts, transport=transport)
        self._outage_s, self._clock = outage_s, clock
        self._replicas = Replicas(self.urls, longest_rest_s=outage_s, clock=clock)

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
            PeerError: no replica answered for `outage_s`, an answer has the wrong shape, or the replicas do not
                serve the same model.
        """
        num_rows = [len(ids) - prompt_length for ids, prompt_length in sequences]
        limit = max_rows_per_request or -(-sum(num_rows) // len(self.urls))
        parts = cut_by_rows(num_rows, limit)

        room = asyncio.Semaphore(_SCORES_IN_FLIGHT * len(self.urls))

        async def one(part: slice) -> list[TeacherScores]:
            asked = [{"token_ids": ids, "prompt_length": length} for ids, length in sequences[part]]
            if support_ids is not None:
                asked = [{**s, "support_ids": ids} for s, ids in zip(asked, support_ids[part], strict=True)]
            body = {"sequences": asked, "top_k": top_k, "temperature": temperature}
            try:
                async with room:
                    url, scores = await self._score_somewhere(body)
            except ProblemError as error:
                if error.status != _TOO_LARGE or len(asked) == 1:
                    raise
                middle = (part.start + part.stop) // 2
                halves = slice(part.start, middle), slice(middle, part.stop)
                return [scores for half in halves for scores in await one(half)]
            width = None if support_ids is None else len(support_ids[part.start][0])
            _check_shape(url, scores, num_rows[part], top_k, width)
            return [scores]

        pieces = await _all_or_first_error([one(part) for part in parts])
        return concatenate_scores(list(itertools.chain.from_iterable(pieces)))

    async def _score_somewhere(self, body: dict[str, Any]) -> tuple[str, TeacherScores]:
        """(URL, answer) of the replica that answered."""

        async def send(base: str) -> tuple[str, TeacherScores]:
            url = f"{base}/v1/teacher/logprobs"
            response = await self._send("POST", url, json=body, headers={"Accept": SAFETENSORS_MEDIA_TYPE})
            try:
                return url, decode_scores(response.content)
            except PeerError as error:
                raise PeerError(f"{url}: {error}") from error

        return await self._ask_replicas(send)

    async def _ask_replicas(self, send: Callable[[str], Awaitable[Answer]]) -> Answer:
        """Run `send` with the URL of a replica, of another one at once when that fails, and of all again after a wait.

        Raises:
            PeerError: none answered for `outage_s`; names what became of the last request to each.
            ProblemError: a replica refused the request for good.
        """
        problems: dict[str, str] = {}
        tried: set[str] = set()
        deadline: float | None = None
        num_waits = 0
        while True:
            with self._replicas.lease(tried) as lease:
                try:
                    answer = await send(lease.url)
                    self._replicas.answered(lease)
                    return answer
                except (httpx.TransportError, PeerError) as error:
                    problems[lease.url] = self._judge(lease, error)
            tried.add(lease.url)
            now = self._clock()
            deadline = now + self._outage_s if deadline is None else deadline
            if self._replicas.has_untried(tried):
                continue
            if now >= deadline:
                said = "; ".join(f"{url} {problem}" for url, problem in problems.items())
                raise PeerError(f"no teacher has answered for {self._outage_s:g} s (teacher.outage_s): {said}")
            await asyncio.sleep(min(max(_backoff_s(num_waits), self._rest_s()), deadline - now))
            num_waits += 1
            tried.clear()

    def _rest_s(self) -> float:
        """How long every replica wants to be left alone, a little longer, so that those refused together part."""
        return self._replicas.rest_s() * random.uniform(1.0, 1.25)

    def _judge(self, lease: Lease, error: httpx.TransportError | PeerError) -> str:
        """Tell `Replicas` what an error says of a replica, and put it into words; one that will not pass is raised."""
        if not may_pass(error):
            self._replicas.answered(lease)
            raise error
        if isinstance(error, httpx.TransportError):
            said = describe_transport_error(error)
            self._replicas.failed(lease, said)
            return f"cannot be reached ({said})"
        assert isinstance(error, ProblemError)  # no other PeerError passes
        detail = error.problem.get("detail") or error.problem.get("title")
        said = f"answered {error.status}" + (f" ({detail})" if detail else "")
        if error.retry_after_s is not None:
            self._replicas.rest(lease, error.retry_after_s)
        elif error.status >= 500:
            self._replicas.failed(lease, said)
        else:
            self._replicas.answered(lease)
        return said


def _backoff_s(num_waits: int) -> float:
    return min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(num_waits, 16) + random.uniform(0.0, 1.0))


async def _all_or_first_error(work: list[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """The results in order; at the first error the rest is cancelled, and nothing goes on in the background."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


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
