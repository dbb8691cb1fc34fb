"""What flows from prompts to batches: a prompt with all its samples."""

from dataclasses import dataclass, field

import numpy as np

from services.wire.rollout import RolloutCompletion
from trainer.data.prompts import Prompt


@dataclass(frozen=True)
class Rollout:
    prompt: Prompt
    completion: RolloutCompletion
    policy_version: int
    """Of its oldest token."""
    loss_mask: np.ndarray | None = None
    """[T] bool, which tokens the student sampled; None: all of them. The others, of a tool say, are not trained."""

    @property
    def sequence(self) -> list[int]:
        """Token ids of prompt and completion."""
        return [*self.prompt.token_ids, *self.completion.token_ids.tolist()]


@dataclass(frozen=True)
class ScoredSample:
    """A rollout and the teacher's view of its T sampled tokens."""

    rollout: Rollout
    teacher_token_logprobs: np.ndarray  # [T]
    support_ids: np.ndarray  # [T, K] int32
    teacher_support_logprobs: np.ndarray  # [T, K]
    teacher_tail_logprob: np.ndarray  # [T]
    rewards: tuple[float | None, ...] = ()
    """Of each reward function; None where it does not apply."""


@dataclass(frozen=True)
class Quarantined:
    """A completion that is set aside: what is known of it cannot be trained on."""

    prompt: Prompt
    completion: RolloutCompletion
    reason: str


@dataclass
class PromptGroup:
    """The samples of one prompt.

    Attributes:
        place: index of the prompt in the step, which identifies the group: a step over two epochs can hold a row twice.
        rollouts: by sample, without those that the rollout server spoilt.
        rewards: of each of the rollouts, where the run has rewards and they have been asked for; by function, None where one
            does not apply.
        samples: rollouts with their scores, without those that the teacher could not score; empty until they are asked for.
        quarantined: what neither of them has.
    """

    place: int
    prompt: Prompt
    rollouts: list[Rollout]
    rewards: list[tuple[float | None, ...]] = field(default_factory=list, kw_only=True)
    samples: list[ScoredSample] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
