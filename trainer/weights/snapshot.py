"""What a push takes from the learner: it knows no model."""

from dataclasses import dataclass

import numpy as np

from services.weight_transfer.source import WeightSource


@dataclass(frozen=True)
class GivenTokens:
    """Completions to be scored: token ids, at least one in each prompt and in each completion."""

    prompts: list[list[int]]
    completions: list[list[int]]

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and completion of each."""
        return [[*prompt, *completion] for prompt, completion in zip(self.prompts, self.completions, strict=True)]


@dataclass(frozen=True)
class WeightSnapshot:
    """The student's weights at a version.

    Attributes:
        source: yields them under the names of a checkpoint, in the dtype of the rollout servers.
        canary_logprobs: the trainer's, [T] of each completion of the canary.
    """

    version: int
    source: WeightSource
    canary_logprobs: list[np.ndarray]
