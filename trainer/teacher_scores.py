"""Completions to scored samples: the teacher's logprobs, checked before they can become a number in a loss.

consumes   Rollout
produces   ScoredSample, or a quarantined completion with a reason
waits for  the servers of all teachers that are asked; they answer when their queue allows
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from services.clients.base import all_or_first_error
from services.clients.teacher import RefusedSequenceError
from services.clients.teacher_answers import mismatches
from services.errors import PeerError
from services.process.files import append_line
from services.wire.teacher import TeacherScores
from trainer.groups import Quarantined, Rollout, ScoredSample
from trainer.teachers import Teacher, Teachers, option_prefix

# Distance of a row's probabilities from one that rounding can explain.
_MASS_TOLERANCE = 1e-3
# Rounding of a tail that a teacher computes as one minus the mass of its candidates (vLLM's).
_TAIL_RESOLUTION = 1e-5
# Difference of two logprobs of one token that rounding can explain, nats.
_LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Support:
    """The tokens of each position, besides the sampled one, at which teacher and student are compared."""

    kind: Literal["teacher_topk", "student_topk"]
    """Whose likeliest tokens they are; chosen without looking at the sampled one, or hybrid would be biased."""
    size: int
    vocab_size: int
    """Of the student; ids from there on are padding of the teacher's embedding."""

    @property
    def has_tail(self) -> bool:
        """Whether there are tokens outside the support."""
        return self.size < self.vocab_size

    @property
    def student_top_k(self) -> int:
        """What the rollout servers are asked for."""
        return self.size if self.kind == "student_topk" else 0


async def score_rollouts(
    teachers: Teachers, rollouts: list[Rollout], *, support: Support, temperature: float
) -> list[ScoredSample | Quarantined]:
    """Ask each rollout's teacher for the logprobs of the sampled token and of the support at every completion position.

    All teachers are asked at once; the answer is in the order of the rollouts.
    """

    scored: dict[int, ScoredSample | Quarantined] = {}

    async def ask(teacher: Teacher, indices: list[int]) -> None:
        own = [rollouts[index] for index in indices]
        scored.update(zip(indices, await _ask(teacher, own, support, temperature), strict=True))

    await all_or_first_error([ask(*part) for part in teachers.split(r.prompt for r in rollouts)])
    return [scored[index] for index in range(len(rollouts))]


async def _ask(
    teacher: Teacher, rollouts: list[Rollout], support: Support, temperature: float
) -> list[ScoredSample | Quarantined]:
    """Score rollouts that are all of one teacher."""
    sequences = [(r.sequence, len(r.prompt.token_ids)) for r in rollouts]
    refused: dict[int, str] = {}

    def refuse(index: int, error: RefusedSequenceError) -> None:
        refused[index] = f"the teacher refused it: {error.reason}"

    options: dict[str, Any] = {"temperature": temperature, "on_mismatch": "keep", "on_refused": refuse}
    if support.kind == "teacher_topk":
        scores = await teacher.score(sequences, top_k=support.size, **options)
    else:
        # The server always ranks, so its own likeliest token comes along.
        ids = [_student_topk(r).tolist() for r in rollouts]
        scores = await teacher.score(sequences, top_k=1, support_ids=ids, **options)
    other_rows = mismatches(scores, sequences)
    scored: list[ScoredSample | Quarantined] = []
    for index, rollout in enumerate(rollouts):
        sample = _slice(rollout, scores, index, support)
        reason = refused.get(index) or other_rows.get(index) or defect(sample, support)
        if reason:
            reason = option_prefix(teacher.name) + reason
            scored.append(Quarantined(rollout.prompt, rollout.completion, reason))
        else:
            scored.append(sample)
    return scored


def _student_topk(rollout: Rollout) -> np.ndarray:
    ids = rollout.completion.student_topk_ids
    if ids is None:
        raise PeerError("the rollout server sent no student top-k, which loss.support = student_topk needs")
    return ids


def _slice(rollout: Rollout, scores: TeacherScores, index: int, support: Support) -> ScoredSample:
    rows = slice(scores.row_offsets[index], scores.row_offsets[index + 1])
    if support.kind == "teacher_topk":
        ids, logprobs, tails = scores.topk_ids[rows], scores.topk_logprobs[rows], scores.tail_logprobs[rows]
    else:
        assert scores.support_logprobs is not None and scores.support_tail_logprobs is not None  # the client checked
        ids, logprobs = _student_topk(rollout), scores.support_logprobs[rows]
        tails = scores.support_tail_logprobs[rows]
    return ScoredSample(
        rollout,
        teacher_token_logprobs=scores.token_logprobs[rows],
        support_ids=ids,
        teacher_support_logprobs=logprobs,
        teacher_tail_logprob=tails,
    )


def defect(sample: ScoredSample, support: Support) -> str | None:
    """Why a sample's teacher rows cannot be trained on, or None."""
    length, tokens = len(sample.rollout.completion.token_ids), sample.teacher_token_logprobs
    ids, logprobs, tails = sample.support_ids, sample.teacher_support_logprobs, sample.teacher_tail_logprob
    if len(tokens) != length:
        return f"the teacher scored {len(tokens)} of {length} tokens"
    if ids.shape != logprobs.shape or len(ids) != length or len(tails) != length:
        return f"the teacher's candidates have the shapes {ids.shape}, {logprobs.shape} and {tails.shape} for {length} tokens"
    if not np.isfinite(tokens).all():
        return "the teacher gave a logprob that is not finite to a sampled token"
    # A student that puts mass where the teacher has none at all would make the loss infinite.
    if not np.isfinite(logprobs).all() or not (np.isfinite(tails).all() or not support.has_tail):
        return "the teacher's candidates hold a value that is no finite logprob"
    if (np.diff(np.sort(ids, -1), axis=-1) == 0).any():
        return "the teacher named a candidate twice in one row"
    if ids.min(initial=0) < 0:
        return f"candidate {ids.min()} is no token"
    if ids.max(initial=-1) >= support.vocab_size:
        return f"candidate {ids.max()} is padding of the teacher: the student has {support.vocab_size} tokens"
    mass = np.exp(logprobs.astype(np.float64)).sum(-1) + np.exp(tails.astype(np.float64))
    furthest = mass[np.abs(mass - 1.0).argmax()] if length else 1.0
    if abs(furthest - 1.0) > _MASS_TOLERANCE:
        return f"the teacher's probabilities of one row sum to {furthest:.4f}"
    if (highest := float(tokens.max(initial=-np.inf))) > _LOGPROB_TOLERANCE:
        return f"the teacher gave a sampled token the logprob {highest:.4g}, which is no probability"
    return _contradiction(sample, support)


def _contradiction(sample: ScoredSample, support: Support) -> str | None:
    """Where the sampled token's logprob cannot stand beside those of the support: rows of another position, or of
    another temperature, look well-formed but are not of one distribution."""
    token_ids, logprobs = sample.rollout.completion.token_ids, sample.teacher_token_logprobs
    same = sample.support_ids == token_ids[:, None]
    inside = same.any(-1)
    among = np.where(same, sample.teacher_support_logprobs, 0.0).sum(-1)
    # A token outside the support is part of the tail, and no likelier than the teacher's likeliest tokens.
    bound = sample.teacher_tail_logprob
    if support.kind == "teacher_topk":
        bound = np.minimum(bound, sample.teacher_support_logprobs.min(-1))
    over = np.where(np.exp(logprobs) - np.exp(bound) > _TAIL_RESOLUTION, logprobs - bound, 0.0)
    excess = np.where(inside, np.abs(logprobs - among), over)
    if excess.max(initial=0.0) <= _LOGPROB_TOLERANCE:
        return None
    row = int(excess.argmax())
    other = (
        f"{among[row]:.4f} among its candidates"
        if inside[row]
        else f"at most {bound[row]:.4f} to those outside its candidates"
    )
    return f"the teacher gave token {token_ids[row]} in row {row} {logprobs[row]:.4f}, and {other}"


class Quarantine:
    """Writes set-aside samples to a JSONL file and stops the run when they become many.

    Args:
        path: quarantine.jsonl of the run.
        max_rate: share of a step's samples above which `add` raises.
    """

    def __init__(self, path: Path, max_rate: float) -> None:
        self._path, self._max_rate = path, max_rate

    def add(self, quarantined: list[Quarantined], num_samples: int, step: int | None = None) -> None:
        """Record one step's set-aside samples.

        Args:
            step: whose samples they are; a run that goes on from an earlier one does it again.

        Raises:
            PeerError: they are more than `max_rate` of the step's samples.
            OutputError: they cannot be written down.
        """
        if not quarantined:
            return
        for item in quarantined:
            completion = item.completion.token_ids.tolist()
            record = {"row": item.prompt.row, "reason": item.reason, "completion": completion}
            record |= {} if step is None else {"step": step}
            append_line(self._path, json.dumps(record).encode())
        if len(quarantined) > self._max_rate * num_samples:
            raise PeerError(
                f"{len(quarantined)} of {num_samples} completions of a step were set aside ({quarantined[0].reason}); "
                f"above pipeline.max_quarantine_rate = {self._max_rate}; see {self._path}"
            )
