"""Completions to scored samples: the teacher's logprobs, checked before they can become a number in a loss.

consumes   Rollout
produces   ScoredSample, or a quarantined rollout with a reason
waits for  the teacher servers; they answer when their queue allows
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.clients import TeacherClient
from services.errors import PeerError
from services.schemas import TeacherScores
from trainer.rollouts import Rollout

# Over-unit mass of a row's probabilities that rounding can explain.
_MASS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ScoredSample:
    """A rollout and the teacher's view of its T sampled tokens."""

    rollout: Rollout
    teacher_token_logprobs: np.ndarray  # [T]
    support_ids: np.ndarray  # [T, K] int32
    teacher_support_logprobs: np.ndarray  # [T, K]
    teacher_tail_logprobs: np.ndarray  # [T]


@dataclass(frozen=True)
class Quarantined:
    rollout: Rollout
    reason: str


async def score_rollouts(
    client: TeacherClient, rollouts: list[Rollout], *, top_k: int, temperature: float
) -> tuple[list[ScoredSample], list[Quarantined]]:
    """Ask the teacher for the sampled token's and its top-k logprobs at every completion position."""
    sequences = [(r.sequence, len(r.prompt.token_ids)) for r in rollouts]
    scores = await client.score(sequences, top_k=top_k, temperature=temperature)
    samples, quarantined = [], []
    for index, rollout in enumerate(rollouts):
        sample = _slice(rollout, scores, index)
        reason = defect(sample)
        if reason is None:
            samples.append(sample)
        else:
            quarantined.append(Quarantined(rollout, reason))
    return samples, quarantined


def _slice(rollout: Rollout, scores: TeacherScores, index: int) -> ScoredSample:
    rows = slice(scores.row_offsets[index], scores.row_offsets[index + 1])
    return ScoredSample(
        rollout,
        teacher_token_logprobs=scores.token_logprobs[rows],
        support_ids=scores.topk_ids[rows],
        teacher_support_logprobs=scores.topk_logprobs[rows],
        teacher_tail_logprobs=scores.tail_logprobs[rows],
    )


def defect(sample: ScoredSample) -> str | None:
    """Why a sample's teacher rows cannot be trained on, or None."""
    length = len(sample.rollout.completion.token_ids)
    if len(sample.teacher_token_logprobs) != length:
        return f"the teacher scored {len(sample.teacher_token_logprobs)} of {length} tokens"
    if not np.isfinite(sample.teacher_token_logprobs).all():
        return "the teacher gave a logprob that is not finite to a sampled token"
    # A student that puts mass where the teacher has none at all would make the loss infinite.
    if not np.isfinite(sample.teacher_support_logprobs).all() or not np.isfinite(sample.teacher_tail_logprobs).all():
        return "the teacher's candidates hold a value that is no finite logprob"
    mass = np.exp(sample.teacher_support_logprobs.astype(np.float64)).sum(-1)
    mass += np.exp(sample.teacher_tail_logprobs.astype(np.float64))
    if any(len(set(row)) < len(row) for row in sample.support_ids.tolist()):
        return "the teacher named a candidate twice in one row"
    if mass.max(initial=0.0) > 1 + _MASS_TOLERANCE:
        return f"the teacher's probabilities of one row sum to {mass.max():.4f}"
    return None


class Quarantine:
    """Writes set-aside samples to a JSONL file and stops the run when they become many.

    Args:
        path: quarantine.jsonl of the run.
        max_rate: share of a step's samples above which `add` raises.
    """

    def __init__(self, path: Path, max_rate: float) -> None:
        self._path, self._max_rate = path, max_rate
        self.count = 0

    def add(self, quarantined: list[Quarantined], num_samples: int) -> None:
        """Record one step's set-aside samples.

        Raises:
            PeerError: they are more than `max_rate` of the step's samples.
        """
        if not quarantined:
            return
        self.count += len(quarantined)
        with self._path.open("a", encoding="utf-8") as file:
            for item in quarantined:
                completion = item.rollout.completion.token_ids.tolist()
                record = {"row": item.rollout.prompt.row, "reason": item.reason, "completion": completion}
                file.write(json.dumps(record) + "\n")
        if len(quarantined) > self._max_rate * num_samples:
            raise PeerError(
                f"{len(quarantined)} of {num_samples} samples of a step had unusable teacher rows ({quarantined[0].reason}); "
                f"above pipeline.max_quarantine_rate = {self._max_rate}; see {self._path}"
            )
