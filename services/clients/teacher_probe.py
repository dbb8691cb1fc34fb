"""A fixed question to every teacher of a run, whose answer must stay what it was at the start.

consumes   a few sequences of the data, scored when the run attaches
produces   nothing where a teacher still answers as it did, else an error that says how it differs
waits for  the teacher that is asked

A teacher that was started again may hold another model, other options, or no weights at all: some answer that every token is
equally likely after a wake-up. So it is asked before it scores again whenever that may have happened: after a failure, after a
silence, when its rows look like those of no weights, and every few steps.
"""

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from services.clients.teacher_answers import Origin, check_answer
from services.errors import ChangedTeacherError, StartupError
from services.wire.teacher import MODEL_DIGITS, TeacherInfo, TeacherScores

logger = logging.getLogger(__name__)

PROBE_SEQUENCES, PROBE_TOKENS = 4, 32
_TOP_K = 8
# No server is started again in less; within it a connection that was kept alive tells.
_SILENCE_S = 2.0
# Mean difference of logprobs, nats. Rounding depends on what else is computed at the same time, which the start does not show.
_FLOORS = {"float32": 2e-3}
_HALF_FLOOR = 0.05
_CEILING = 0.1
_MARGIN = 3.0
# Below this no logprob tells two models apart; a plain vLLM server writes -9999 for minus infinity.
_LOWEST = -60.0

_FIELDS = (
    *("protocol", "tokenizer_fingerprint", "vocab_size", "padded_vocab_size", "eos_token_ids", "chat_template_hash"),
    *("temperature_support", "scores_support_ids"),
)
_LIMITS = ("max_model_len", "max_top_k")


@dataclass(frozen=True)
class _Known:
    """A replica's answer at the start of the run, and how far a later one may be from it."""

    scores: TeacherScores
    tolerance: float


@dataclass(frozen=True)
class ProbeAnswer:
    """What a teacher is known by, from one attempt of a run to the next.

    Attributes:
        question: hash of the probe's token ids.
        logprobs: of the tokens that it asks for, nats.
        tolerance: mean difference of logprobs that is no change, nats.
        tells_model: whether the first digits of the fingerprint say which model it is; a plain vLLM server's do not.
    """

    model: str
    fingerprint: str
    tells_model: bool
    question: str
    logprobs: list[float]
    tolerance: float

    def changed(self, now: "ProbeAnswer") -> str | None:
        """How the teacher that answers now differs from the one that answered this, as what follows its name; None: it does
        not. Answers to different questions are not compared."""
        one, other = (answer.fingerprint[:MODEL_DIGITS] for answer in (self, now))
        if self.tells_model and now.tells_model and one != other:
            return f"is another model: {now.model} ({now.fingerprint}), was {self.model} ({self.fingerprint})"
        if self.question != now.question:
            return None
        found, most = float(np.abs(np.subtract(self.logprobs, now.logprobs)).mean()), max(self.tolerance, now.tolerance)
        if found <= most:
            return None
        return (
            f"scores the same tokens differently: by {found:.2g} nats on average, more than {most:.2g} "
            "(teacher_client.probe_tolerance)"
        )


class TeacherProbe:
    """Asks the replicas of one teacher, each by itself.

    Args:
        infos: what each says of itself.
        sequences: (token ids, length of the prompt) of each; cut to what all replicas take.
        ask: the scores of sequences from the replica at a URL; without retries.
        info: what that replica says of itself.
        tolerance: mean difference of logprobs that is no change, nats; default: from what the start shows.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        infos: dict[str, TeacherInfo],
        sequences: list[tuple[list[int], int]],
        *,
        ask: Callable[[str, dict[str, Any]], Awaitable[TeacherScores]],
        info: Callable[[str], Awaitable[TeacherInfo]],
        tolerance: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._infos, self._ask, self._info = infos, ask, info
        self._sequences = _fitting(sequences, list(infos.values()))
        self._top_k = min(_TOP_K, *(info.max_top_k for info in infos.values()))
        self._given_tolerance, self._clock = tolerance, clock
        self._known: dict[str, _Known] = {}
        self._refused: set[str] = set()
        self._heard: dict[str, float] = {}
        """When a replica that is believed was last heard of."""
        self._locks = {url: asyncio.Lock() for url in infos}

    # ---------------------------------------------------------------------------------------- at the start

    async def begin(self, url: str) -> None:
        """Keep what the replica at `url` answers; the first one's answer is what all others are compared with.

        Raises:
            StartupError: it answers differently twice, unlike the first one, or as if it had no weights.
        """
        info = self._infos[url]
        together = await self._score(url, self._sequences)
        if is_uniform(together):
            raise StartupError(f"{url} finds every token equally likely: its weights are not loaded; start it again")
        alone = [await self._score(url, [sequence]) for sequence in self._sequences]
        noise = float(np.max([difference(_slice(together, i), one) for i, one in enumerate(alone)]))
        if math.isnan(noise):
            raise StartupError(f"{url} answers with logprobs that are no numbers; look at its model and its dtype")
        tolerance = self._tolerance(info.dtype, noise)
        if not noise <= tolerance:
            raise StartupError(
                f"{url} answers differently when it is asked twice: logprobs of the same tokens differ by {noise:.2g} nats on "
                f"average, more than {tolerance:.2g}; if that is meant, raise teacher_client.probe_tolerance"
            )
        first = next(iter(self._known.values()), None)
        if first is not None:
            tolerance = max(tolerance, first.tolerance)
            if not (found := difference(first.scores, together)) <= tolerance:
                raise StartupError(
                    f"{url} does not score as its replica at {next(iter(self._infos))} does: logprobs of the same tokens differ by "
                    f"{found:.2g} nats on average, more than {tolerance:.2g}; give the URLs of replicas of one model, or raise "
                    "teacher_client.probe_tolerance"
                )
        self._known[url] = _Known(together, tolerance)
        self._heard[url] = self._clock()

    @property
    def answer(self) -> ProbeAnswer:
        """That of the first replica, at the start."""
        url, info = next(iter(self._infos.items()))
        known = self._known[url]
        question = hashlib.sha256(json.dumps(self._sequences).encode()).hexdigest()[:16]
        logprobs = np.maximum(known.scores.token_logprobs.astype(np.float64), _LOWEST).tolist()
        tells_model = info.server == "distillserve"
        return ProbeAnswer(info.model, info.fingerprint, tells_model, question, logprobs, known.tolerance)

    def _tolerance(self, dtype: str, noise: float) -> float:
        if self._given_tolerance is not None:
            return self._given_tolerance
        return min(max(_FLOORS.get(dtype, _HALF_FLOOR), _MARGIN * noise), _CEILING)

    async def _score(self, url: str, sequences: list[tuple[list[int], int]]) -> TeacherScores:
        asked = [{"token_ids": ids, "prompt_length": length} for ids, length in sequences]
        scores = await self._ask(url, {"sequences": asked, "top_k": self._top_k, "temperature": 1.0})
        check_answer(url, scores, asked, self._top_k, 1.0)
        return scores

    # ------------------------------------------------------------------------------------------ in the run

    def distrust(self, url: str) -> None:
        """The replica may have changed; it is asked before it is believed again."""
        self._heard.pop(url, None)

    def distrust_all(self) -> None:
        self._heard.clear()

    def heard(self, url: str) -> None:
        """The replica has answered; one that is distrusted stays so."""
        if url in self._heard:
            self._heard[url] = self._clock()

    def is_trusted(self, url: str) -> bool:
        """Whether the replica has passed the probe, and can hardly have been started again since."""
        return url in self._heard and self._clock() - self._heard[url] < _SILENCE_S

    async def ensure_unchanged(self, url: str) -> None:
        """Ask the replica, where it may have changed; of requests that wait for the same answer one asks.

        Raises:
            ChangedTeacherError: it has.
            httpx.RequestError, PeerError: it did not answer.
        """
        async with self._locks[url]:
            if self.is_trusted(url):
                return
            self.distrust(url)
            info = await self._info(url)
            self._refuse(url, self._changed_info(url, info))
            scores = await self._score(url, self._sequences)
            self._refuse(url, self._changed_scores(url, scores))
            self._refused.discard(url)
            self._heard[url] = self._clock()
            logger.debug("%s answers the probe as it did at the start of the run", url)

    def refuse(self, url: str, problem: str) -> NoReturn:
        """Raise for a replica that has changed.

        Args:
            problem: how, as what follows its URL.

        Raises:
            ChangedTeacherError: says it.
        """
        self.distrust(url)
        self._refused.add(url)
        if len(self._refused) < len(self._infos):
            raise ChangedTeacherError(problem, may_pass=True)
        raise ChangedTeacherError(
            f"the teacher at {url} {problem}; start it as it was, then the run again", may_pass=False
        )

    def _refuse(self, url: str, problem: str | None) -> None:
        if problem is not None:
            self.refuse(url, problem)

    def _changed_info(self, url: str, info: TeacherInfo) -> str | None:
        before = self._infos[url]
        if info.fingerprint != before.fingerprint:
            return changed_model(before, info)
        for name in _FIELDS:
            if getattr(info, name) != getattr(before, name):
                return f"has changed since the start of the run: {name} = {getattr(info, name)!r}, was {getattr(before, name)!r}"
        for name in _LIMITS:
            if getattr(info, name) < getattr(before, name):
                return f"takes less than at the start of the run: {name} = {getattr(info, name)}, was {getattr(before, name)}"
        return None

    def _changed_scores(self, url: str, scores: TeacherScores) -> str | None:
        known = self._known[url]
        if is_uniform(scores):
            return "finds every token equally likely, which it did not at the start of the run: its weights are gone"
        if (found := difference(known.scores, scores)) <= known.tolerance:
            return None
        return (
            f"scores the same tokens differently than at the start of the run: by {found:.2g} nats on average, more than "
            f"{known.tolerance:.2g} (teacher_client.probe_tolerance)"
        )


def probe_sequences(prompts: list[list[int]]) -> list[tuple[list[int], int]]:
    """Pieces of the ids of some prompts, behind one another, each with all but its first id to score.

    Args:
        prompts: token ids; together at least one.
    """
    ids = [token for prompt in prompts for token in prompt][: PROBE_SEQUENCES * PROBE_TOKENS]
    ids = ids if len(ids) > 1 else ids * 2
    size = max(2, -(-len(ids) // PROBE_SEQUENCES))
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [(piece, 1) for piece in pieces if len(piece) > 1]


def _fitting(sequences: list[tuple[list[int], int]], infos: list[TeacherInfo]) -> list[tuple[list[int], int]]:
    """The first of the sequences, cut so that all of them are one request that every replica takes."""
    most_tokens, most_sequences, longest = (
        min(getattr(info, name) for info in infos)
        for name in ("max_tokens_per_request", "max_sequences_per_request", "max_model_len")
    )
    kept = sequences[: max(1, min(most_sequences, most_tokens // 2))]
    longest = min(longest, most_tokens // len(kept))
    return [(ids[:longest], length) for ids, length in kept]


def difference(before: TeacherScores, now: TeacherScores) -> float:
    """Mean difference of two answers to one question, nats: of the given tokens or of the likeliest ones, whichever is more.

    The likeliest are compared by rank, for of two equal ones either may come first. NaN where one answer holds NaN; infinite
    where they are not of one question.
    """
    found = []
    for name in ("token_logprobs", "topk_logprobs"):
        one, other = (np.maximum(getattr(scores, name).astype(np.float64), _LOWEST) for scores in (before, now))
        if one.shape != other.shape:
            return float("inf")
        found.append(float(np.abs(one - other).mean()))
    return float(np.max(found))


def is_uniform(scores: TeacherScores) -> bool:
    """Whether the candidates of all rows are equally likely, as they are without weights."""
    topk = scores.topk_logprobs if scores.support_logprobs is None else scores.support_logprobs
    return topk.size > 0 and topk.shape[1] > 1 and bool((topk == topk[:, :1]).all())


def changed_model(before: Origin, now: Origin) -> str:
    """How a teacher with another fingerprint has changed, as what follows its URL."""
    is_same = before.fingerprint[:MODEL_DIGITS] == now.fingerprint[:MODEL_DIGITS]
    what = "computes its model in another way (engine, dtype or options)" if is_same else "is another model"
    return f"{what} than at the start of the run: {now.model} ({now.fingerprint}), was {before.model} ({before.fingerprint})"


def _slice(scores: TeacherScores, index: int) -> TeacherScores:
    """Of one sequence, what `difference` looks at."""
    rows = slice(scores.row_offsets[index], scores.row_offsets[index + 1])
    return replace(scores, token_logprobs=scores.token_logprobs[rows], topk_logprobs=scores.topk_logprobs[rows])
