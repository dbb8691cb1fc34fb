"""What a push takes from the learner: it knows no model."""

import json
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor

from services.weight_transfer.source import WeightSource
from trainer.weights.adapter_proof import AdapterProof


@dataclass(frozen=True)
class GivenTokens:
    """Completions to be scored: token ids, at least one in each prompt and in each completion."""

    prompts: list[list[int]]
    completions: list[list[int]]

    def to_json(self) -> bytes:
        return json.dumps([self.prompts, self.completions]).encode()

    @classmethod
    def from_json(cls, document: bytes) -> Self:
        return cls(*json.loads(document))

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
        proof: finds the adapter in what is sent; None where all weights are trained.
    """

    version: int
    source: WeightSource
    canary_logprobs: list[np.ndarray]
    proof: AdapterProof | None = None


@dataclass(frozen=True)
class StudentState:
    """The student to be saved.

    Attributes:
        step: after which it was so.
        tensors: its weights, whole, under the names of a checkpoint; None: those of the model itself, which holds all of them.
        adapter: what of a model with an adapter is trained, whole, by its names in the model; None: there is none, or it is lost.
    """

    step: int
    tensors: dict[str, Tensor] | None = None
    adapter: dict[str, Tensor] | None = None
