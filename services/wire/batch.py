"""What the pipeline hands to the learner for one step, and what is recorded: one safetensors document.

The learner may be in another process, or on another rank; whoever reads a recorded batch trains on the same numbers.
"""

from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from typing import Any

import numpy as np

from services.errors import PeerError
from services.wire.document import decode_document, encode_document


@dataclass(frozen=True)
class TrainingBatch:
    """Scored completions of one step: B of them, in all P prompt tokens and N completion tokens, K candidates a position.
    With them W windows of text, in all M tokens.

    Attributes:
        groups: index of the prompt in the step; the samples of one prompt share it, those of a row that comes twice do not.
        policy_versions: of the oldest token of each completion.
        rewards: None where the run has none; NaN where a function does not apply to a completion.
        reward_names: of the F functions that gave them.
        texts: of the prompts, for people.
        metrics: of how the batch came about.
        used: which of the data the batch has used, see trainer/checkpoint/journal.py; {}: nobody wrote it down.
    """

    rows: np.ndarray  # [B] int64, of the data file
    groups: np.ndarray  # [B] int64
    prompt_lengths: np.ndarray  # [B] int64
    completion_lengths: np.ndarray  # [B] int64, at least 1
    truncated: np.ndarray  # [B] bool, whether the completion hit max_new_tokens
    policy_versions: np.ndarray  # [B] int64
    prompt_ids: np.ndarray  # [P] int32
    token_ids: np.ndarray  # [N] int32, sampled tokens
    rollout_logprobs: np.ndarray  # [N] float32, of token_ids under the policy that sampled
    teacher_token_logprobs: np.ndarray  # [N]
    support_ids: np.ndarray  # [N, K] int32
    teacher_support_logprobs: np.ndarray  # [N, K]
    teacher_tail_logprob: np.ndarray  # [N] log of the mass outside the support
    window_lengths: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int64))  # [W] int64
    window_ids: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int32))  # [M] int32
    loss_mask: np.ndarray = field(default_factory=partial(np.zeros, 0, np.bool_))  # [N] bool, or none where all count
    rewards: np.ndarray | None = None  # [B, F] float64
    reward_names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _prompt_ends(self) -> np.ndarray:
        return np.cumsum(self.prompt_lengths)

    @cached_property
    def _completion_ends(self) -> np.ndarray:
        return np.cumsum(self.completion_lengths)

    def prompt(self, index: int) -> np.ndarray:
        """Token ids of one prompt."""
        end = int(self._prompt_ends[index])
        return self.prompt_ids[end - int(self.prompt_lengths[index]) : end]

    def completion(self, index: int) -> slice:
        """Where among the N completion tokens those of one completion are."""
        end = int(self._completion_ends[index])
        return slice(end - int(self.completion_lengths[index]), end)

    def counts(self) -> np.ndarray:
        """[N] bool, which completion tokens are trained: those that the student sampled."""
        return self.loss_mask if len(self.loss_mask) else np.ones(len(self.token_ids), np.bool_)

    def windows(self) -> list[list[int]]:
        """Token ids of each window of text."""
        parts = np.split(self.window_ids, np.cumsum(self.window_lengths))[:-1]
        return [part.tolist() for part in parts]


_METADATA = ("reward_names", "texts", "metrics", "used")
_ARRAYS = tuple(f.name for f in fields(TrainingBatch) if f.name not in _METADATA)
# What a run has not, or earlier versions did not record.
_OPTIONAL = ("rewards", "loss_mask")
_OF_TOKENS = (
    "rollout_logprobs",
    "teacher_token_logprobs",
    "support_ids",
    "teacher_support_logprobs",
    "teacher_tail_logprob",
)
_OF_SEQUENCES = ("groups", "prompt_lengths", "completion_lengths", "truncated", "policy_versions")


def encode_batch(batch: TrainingBatch) -> bytes:
    """The batch as a document."""
    arrays: dict[str, np.ndarray | None] = {name: getattr(batch, name) for name in _ARRAYS}
    return encode_document(arrays, {name: getattr(batch, name) for name in _METADATA})


def decode_batch(document: bytes) -> TrainingBatch:
    """Inverse of `encode_batch`.

    Raises:
        PeerError: it is no batch, or its columns differ in length.
    """
    arrays, metadata = decode_document(document)
    columns: dict[str, Any] = {**arrays, **metadata}
    if missing := [name for name in _ARRAYS if name not in arrays and name not in _OPTIONAL]:
        raise PeerError(f"the document is not a batch: {', '.join(missing)} are missing")
    try:
        batch = TrainingBatch(**columns)
    except TypeError as error:
        raise PeerError(f"the document is not a batch: {error}") from error
    for length, names in ((len(batch.rows), _OF_SEQUENCES), (len(batch.token_ids), _OF_TOKENS)):
        for name in names:
            if len(arrays[name]) != length:
                raise PeerError(f"the batch holds {len(arrays[name])} {name} for {length}")
    if len(batch.loss_mask) not in (0, len(batch.token_ids)):
        raise PeerError(f"the batch holds {len(batch.loss_mask)} loss_mask for {len(batch.token_ids)}")
    of_rewards = (len(batch.rows), len(batch.reward_names))
    if batch.rewards is not None and batch.rewards.shape != of_rewards:
        raise PeerError(f"the batch holds rewards of shape {batch.rewards.shape}, expected {of_rewards}")
    for lengths, name in (
        ("prompt_lengths", "prompt_ids"),
        ("completion_lengths", "token_ids"),
        ("window_lengths", "window_ids"),
    ):
        if arrays[lengths].sum() != len(arrays[name]):
            raise PeerError(
                f"the batch holds {len(arrays[name])} {name}, its {lengths} come to {arrays[lengths].sum()}"
            )
    return batch
