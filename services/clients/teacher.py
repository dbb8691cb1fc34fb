"""The client of the teacher servers: work cut to size, spread over replicas, asked again through an outage."""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import numpy as np

from services.clients.arguments import integer, real, teacher_sequences
from services.clients.base import ServerClient, all_or_first_error
from services.clients.outage import may_pass
from services.clients.teacher_answers import (
    TokenIdsAndPromptLength,
    check_answer,
    empty_scores,
    first_replica_problem,
    join_scores,
    mismatches,
    replica_problem,
)
from services.clients.teacher_probe import ProbeAnswer, TeacherProbe, changed_model, is_uniform
from services.clients.teacher_requests import cut_sequences, fair_share
from services.errors import InputError, PeerError, ProblemError, UnreadableAnswerError
from services.process.waiting import waiting_for
from services.wire.document import SAFETENSORS_MEDIA_TYPE
from services.wire.teacher import TeacherInfo, TeacherScores, decode_scores

OnMismatch = Literal["raise", "keep"]
LogprobDtype = Literal["float32", "float16"]

# Score requests under way at once, for each server: enough to keep it busy, few enough to leave its queue to others.
_SCORES_IN_FLIGHT = 8
_TOO_LARGE = 413

# In a problem document, the index of a sequence in its request, which is not its index among those of the caller.
_SEQUENCE_FIELD = re.compile(r"sequences\.(\d+)\.?")


class RefusedSequenceError(ProblemError):
    """A teacher refused one of the sequences.

    Attributes:
        index: of the sequence among those that were asked.
        reason: the teacher's words, without the index that it had in a request.
    """

    def __init__(self, error: ProblemError, index: int) -> None:
        super().__init__(error.url, error.status, error.problem)
        self.index = index
        self.reason = _SEQUENCE_FIELD.sub("", str(error.problem.get("detail") or error))


OnRefused = Callable[[int, RefusedSequenceError], None]
"""Told of each refused sequence: its index among those that were asked, and why."""


@dataclass(frozen=True)
class _Call:
    """One call of `score_sequences`."""

    sequences: list[dict[str, Any]]
    top_k: int
    temperature: float
    logprob_dtype: LogprobDtype
    on_mismatch: OnMismatch
    on_refused: OnRefused | None

    def settings(self) -> dict[str, Any]:
        """The fields of a request beside its sequences."""
        settings: dict[str, Any] = {"top_k": self.top_k, "temperature": self.temperature}
        return settings if self.logprob_dtype == "float32" else {**settings, "logprob_dtype": self.logprob_dtype}

    def body(self, indices: list[int]) -> dict[str, Any]:
        return {"sequences": [self.sequences[index] for index in indices], **self.settings()}

    def support_width(self) -> int | None:
        """M of support_ids; None: not asked for."""
        support_ids = self.sequences[0].get("support_ids")
        return None if support_ids is None else len(support_ids[0]) if support_ids else 0

    def check_answer(self, url: str, indices: list[int], scores: TeacherScores) -> None:
        """Refuse an answer to another question.

        Raises:
            PeerError: names the server and what is wrong.
        """
        asked = [self.sequences[index] for index in indices]
        check_answer(url, scores, asked, self.top_k, self.temperature)
        if self.on_mismatch == "raise" and (found := mismatches(scores, [_as_token_ids(s) for s in asked])):
            raise PeerError(f"{url}: sequence {indices[min(found)]}: {found[min(found)]}")

    def refuse(self, index: int, error: ProblemError) -> None:
        """Tell the caller that a teacher refused the sequence of this index.

        Raises:
            RefusedSequenceError: it does not want to be told, but to end.
        """
        refusal = RefusedSequenceError(error, index)
        if self.on_refused is None:
            raise refusal from error
        self.on_refused(index, refusal)


class TeacherClient(ServerClient):
    """The teacher servers, equal replicas: logprobs of given completions.

    Each request goes to the replica with the fewest of ours in flight, and to the next one when that fails; what is
    retried is 408, 429, 5xx and transport errors. Scoring is pure: asking twice is safe.

    Args:
        urls: base URLs of the replicas; they may be below a path of a reverse proxy ("https://gateway/maths").
        key: bearer token, if the servers ask for one.
        timeout_s: how long to wait for an answer to begin, and between its parts.
        outage_s: how long a score request is asked again while no replica answers it, counted from its first failure.
        attempts: tries of the other requests, the first included.
        transport, clock: replace the network and the time in tests.
    """

    _SERVER = "a distillserve teacher server"
    _NOBODY = "no teacher has answered"
    _SECTION = "teacher_client"
    _TIMEOUT_OPTION = (
        "teacher_client.request_timeout_s (of a client in Python: timeout_s; of `distillserve score`: --timeout-s)"
    )
    _OUTAGE_OPTION = "of a client in Python: outage_s; of `distillserve score`: --outage-s"
    _HAS_BASE_PATH = True
    _MOST_ROWS_PER_REQUEST = 1 << 40

    _first_answer: tuple[str, TeacherInfo | TeacherScores] | None = None
    """Whose the scores are: others must be of the same model."""

    _probe: TeacherProbe | None = None

    async def info(self) -> list[TeacherInfo]:
        """One answer per server, in the order of the URLs; once they agree, scores of another model are refused."""
        answers = await all_or_first_error([self._retrying(url, self._info) for url in self.urls])
        if first_replica_problem(self.urls, answers) is None:
            self._check_same_model(self.urls[0], answers[0])
        return answers

    async def _info(self, url: str) -> TeacherInfo:
        return await self._get_info(f"{url}/v1/teacher/info", TeacherInfo)

    async def vocabulary(self) -> dict[str, int]:
        """The first teacher's token-to-id map, for saying how two tokenizers differ."""

        async def ask(url: str) -> dict[str, int]:
            return (await self._send("GET", f"{url}/v1/teacher/vocabulary")).json()

        return await self._retrying(self.urls[0], ask)

    async def score(
        self,
        sequences: list[TokenIdsAndPromptLength],
        *,
        top_k: int,
        temperature: float = 1.0,
        support_ids: list[list[list[int]]] | None = None,
        max_rows_per_request: int | None = None,
        on_mismatch: OnMismatch = "raise",
        on_refused: OnRefused | None = None,
    ) -> TeacherScores:
        """Score completions, spread over the replicas; when one of them fails, the others take over.

        Args:
            sequences: (token ids of prompt and completion, length of the prompt); ids here and below may be lists, numpy
                arrays or torch tensors of integers.
            top_k: candidates per row.
            support_ids: of each sequence, [rows][M] further token ids to score.
            max_rows_per_request: cut the work into requests of about this many rows; default: one per replica.
                What a server calls too large (413) is cut further.
            on_mismatch: "keep" leaves it to the caller to find sequences whose rows are not those that were asked
                (`mismatches`).
            on_refused: told of each sequence that a teacher refuses; it has no rows in the answer, whose `row_offsets` are
                those of all that were asked, and the others are scored. Without it the first one ends the call.

        Raises:
            InputError: there are no sequences, or ids are no whole numbers; nothing was sent.
            RefusedSequenceError: a teacher refused one of the sequences.
            PeerError: no replica answered for `outage_s`, an answer is not to the question, or the replicas do not
                serve the same model.
        """
        asked: list[dict[str, Any]] = [{"token_ids": ids, "prompt_length": length} for ids, length in sequences]
        if support_ids is not None:
            if len(support_ids) != len(asked):
                raise InputError(
                    f"support_ids is of {len(support_ids)} sequences, sequences of {len(asked)}; pass one each"
                )
            asked = [{**s, "support_ids": ids} for s, ids in zip(asked, support_ids, strict=True)]
        return await self.score_sequences(
            asked,
            top_k=top_k,
            temperature=temperature,
            max_rows_per_request=max_rows_per_request,
            on_mismatch=on_mismatch,
            on_refused=on_refused,
        )

    async def score_text(self, texts: list[tuple[str, str]], *, top_k: int, temperature: float = 1.0) -> TeacherScores:
        """Score (prompt, completion) texts; the teacher tokenizes, and `token_ids` of the answer says how.

        Raises:
            As `score`.
        """
        asked = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
        return await self.score_sequences(asked, top_k=top_k, temperature=temperature)

    async def score_sequences(
        self,
        sequences: list[dict[str, Any]],
        *,
        top_k: int,
        temperature: float = 1.0,
        logprob_dtype: LogprobDtype = "float32",
        max_rows_per_request: int | None = None,
        on_mismatch: OnMismatch = "raise",
        on_refused: OnRefused | None = None,
    ) -> TeacherScores:
        """Score sequences in any of the forms of the API (services.wire.teacher.TeacherSequence), mixed as you like.

        Of a text, the rows are not known before; each of its characters is counted as one.

        Args:
            logprob_dtype: "float16" halves the bytes of a candidate's logprob on the wire, and keeps three digits.

        Raises:
            As `score`.
        """
        call = _Call(
            teacher_sequences(sequences),
            integer("top_k", top_k, at_least=1),
            real("temperature", temperature),
            logprob_dtype,
            on_mismatch,
            on_refused,
        )
        self._check_askable(call.sequences, call.settings())
        most_rows = fair_share(call.sequences, len(self.urls))
        if max_rows_per_request is not None:
            most_rows = integer("max_rows_per_request", max_rows_per_request, at_least=1)
        requests = cut_sequences(call.sequences, min(most_rows, self._MOST_ROWS_PER_REQUEST))
        room = asyncio.Semaphore(_SCORES_IN_FLIGHT * len(self.urls))
        answers = await all_or_first_error([self._score_part(call, indices, room) for indices in requests])
        parts = [part for answer in answers for part in answer]
        return join_scores(parts, len(call.sequences)) if parts else await self._no_scores(call)

    async def _score_part(
        self, call: _Call, indices: list[int], room: asyncio.Semaphore
    ) -> list[tuple[list[int], TeacherScores]]:
        """(indices, scores) of the requests into which the sequences of these indices were cut, rising; without the refused."""
        answers: list[tuple[list[int], TeacherScores]] = []
        left = [indices]
        while left:
            part = left.pop()
            try:
                async with room:
                    url, scores = await self._score_somewhere(call.body(part))
            except ProblemError as error:
                left += reversed(self._left_after_refusal(call, part, error))
            else:
                call.check_answer(url, part, scores)
                answers.append((part, scores))
        return answers

    def _left_after_refusal(self, call: _Call, indices: list[int], error: ProblemError) -> list[list[int]]:
        """What is to be asked instead of a request that was refused: its halves, or the others when one was at fault.

        Raises:
            ProblemError: the request was refused as a whole.
            RefusedSequenceError: one was at fault, and there is no `on_refused` to tell.
        """
        if len(indices) > 1 and self._may_be_cut(error):
            middle = len(indices) // 2
            return [indices[:middle], indices[middle:]]
        if (refused := self._refused_index(error, len(indices))) is None:
            raise error
        call.refuse(indices[refused], error)
        others = [*indices[:refused], *indices[refused + 1 :]]
        return [others] if others else []

    async def _no_scores(self, call: _Call) -> TeacherScores:
        """The answer when every sequence was refused."""
        _, source = self._first_answer or ("", await self._outlasting(self._replicas, self._info))
        return empty_scores(
            source,
            call.temperature,
            call.top_k,
            num_sequences=len(call.sequences),
            support_width=call.support_width(),
            logprob_dtype=np.dtype(call.logprob_dtype),
        )

    def _check_askable(self, sequences: list[dict[str, Any]], settings: dict[str, Any]) -> None:
        """Refuse what servers of this kind do not do."""

    def _may_be_cut(self, error: ProblemError) -> bool:
        """Whether a part of a request that was refused for this reason may be answered."""
        return error.status == _TOO_LARGE

    def _refused_index(self, error: ProblemError, num_asked: int) -> int | None:
        """Which sequence of a request was refused, where the problem is one of a sequence."""
        named = _SEQUENCE_FIELD.match(str(error.problem.get("field")))
        if named is not None and int(named[1]) < num_asked:
            return int(named[1])
        return 0 if num_asked == 1 and self._may_be_cut(error) else None

    async def keep_probe(self, sequences: list[TokenIdsAndPromptLength], tolerance: float | None = None) -> None:
        """Remember how each replica scores these sequences; from now on one that no longer does is not believed.

        Args:
            tolerance: as of TeacherProbe.

        Raises:
            StartupError: a replica answers differently twice, unlike the first one, or as if it had no weights.
            PeerError: one does not answer.
        """
        infos = dict(zip(self.urls, await self.info(), strict=True))
        probe = TeacherProbe(
            *(infos, sequences), ask=self._ask, info=self._ask_info, tolerance=tolerance, clock=self._clock
        )
        for url in self.urls:
            await self._outlasting(self._alone[url], probe.begin)
        self._probe = probe

    @property
    def probe_answer(self) -> ProbeAnswer:
        """What the teacher has answered to the probe that is kept."""
        assert self._probe is not None, "keep_probe comes first"
        return self._probe.answer

    def distrust(self) -> None:
        """Ask the probe, where one is kept, before anything else is asked."""
        if self._probe is not None:
            self._probe.distrust_all()

    async def _score_somewhere(self, body: dict[str, Any]) -> tuple[str, TeacherScores]:
        """(URL, answer) of the replica that answered."""

        async def send(url: str) -> tuple[str, TeacherScores]:
            with waiting_for(f"scores of {url}", "scores"):
                return url, await self._score_on(url, body)

        return await self._outlasting(self._replicas, send)

    async def _score_on(self, url: str, body: dict[str, Any]) -> TeacherScores:
        """Scores of the replica at `url`, which answers the probe as at the start, where one is kept."""
        probe = self._probe
        if probe is None:
            return await self._ask(url, body)
        try:
            await probe.ensure_unchanged(url)
            scores = await self._ask(url, body)
        except (httpx.RequestError, PeerError) as error:
            if may_pass(error) and not _is_busy(error):
                probe.distrust(url)
            raise
        if is_uniform(scores):
            probe.distrust(url)
        probe.heard(url)
        await probe.ensure_unchanged(url)  # where another request has failed meanwhile, or these rows are strange
        return scores

    async def _ask(self, url: str, body: dict[str, Any]) -> TeacherScores:
        """The answer of the replica at `url` to one request."""
        where = f"{url}/v1/teacher/logprobs"
        response = await self._send("POST", where, json=body, headers={"Accept": SAFETENSORS_MEDIA_TYPE})
        try:
            scores = decode_scores(response.content)
        except PeerError as error:
            raise UnreadableAnswerError(where, f"not scores: {error}", response.content) from error
        self._check_same_model(url, scores)
        return scores

    async def _ask_info(self, url: str) -> TeacherInfo:
        """What the replica says of itself now, whatever it has said before."""
        return await self._info(url)

    def _check_same_model(self, url: str, answer: TeacherInfo | TeacherScores) -> None:
        """Refuse an answer of another model than the first one, also when a server was replaced in between.

        Raises:
            PeerError: names both servers and models.
        """
        self._first_answer = self._first_answer or (url, answer)
        if (problem := replica_problem(self._first_answer, (url, answer))) is not None:
            if self._probe is not None:
                self._probe.refuse(url, changed_model(self._first_answer[1], answer))
            raise PeerError(f"the teachers {problem}")


def _is_busy(error: Exception) -> bool:
    """Whether a server says that it works on other requests."""
    return isinstance(error, ProblemError) and error.status in (408, 429)


def _as_token_ids(sequence: dict[str, Any]) -> TokenIdsAndPromptLength | None:
    if sequence.get("token_ids") is None:
        return None
    return sequence["token_ids"], sequence.get("prompt_length") or 0
