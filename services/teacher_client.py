"""The client of the teacher servers."""

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from services.errors import PeerError, ProblemError
from services.schemas import TeacherInfo, TeacherScores
from services.server_client import ServerClient
from services.wire import SAFETENSORS_MEDIA_TYPE, decode_scores

Sequence = tuple[list[int], int]
"""Token ids of prompt and completion, and the prompt's length."""

# Score requests under way at once, for each server: enough to keep it busy, few enough to leave its queue to others.
_SCORES_IN_FLIGHT = 8
_TOO_LARGE = 413


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
