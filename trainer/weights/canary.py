"""Given tokens that the trainer and every engine score after each push: whether both hold the same weights.

The checksums of a push say that the bytes arrived; the canary says that they are where they belong. What two implementations
round differently, version 0 shows, and later versions may show a few times that. But wrong weights at version 0 must not
calibrate themselves, so there is a ceiling that no rounding reaches.
"""

import numpy as np
import torch
from transformers import PreTrainedModel

from services.config import WeightSyncConfig
from services.errors import WeightSyncError
from services.models.causal_lm import rope_switch
from services.models.padding import cut_by_padded_tokens, pad_rows, predicting_positions
from trainer.model import evaluating, student_logprobs

NEW_TOKENS = 8
"""That a server samples for each canary, once; they are what is compared."""
PROMPT_TOKENS = 8
"""Of the end of a prompt. Weights in a wrong place show at every token, and each costs time at every push."""

# The largest difference in float32; in half precision the mean, for single tokens differ by more.
_FLOORS = {"float32": 1e-4, "half": 0.05}
_CEILINGS = {"float32": 1e-2, "half": 0.1}
_MARGIN = 3.0


class Canary:
    """Prompts with completions that the student itself has sampled: at tokens it would not write, both sides round more.

    Args:
        prompts: token ids.
        completions: token ids, at least one each.
        dtypes: of the rollouts and of the student's products.
        tokens_per_micro_batch: bounds the forward pass.
    """

    def __init__(
        self,
        config: WeightSyncConfig,
        prompts: list[list[int]],
        completions: list[list[int]],
        *,
        dtypes: tuple[str, str],
        compute_dtype: torch.dtype,
        tokens_per_micro_batch: int,
    ) -> None:
        self.sequences = [[*prompt, *tokens] for prompt, tokens in zip(prompts, completions, strict=True)]
        self._lengths = [len(tokens) for tokens in completions]
        self._tolerance = config.canary_tolerance
        self._dtype = next((dtype for dtype in dtypes if dtype != "float32"), "float32")
        self._compute_dtype, self._tokens = compute_dtype, tokens_per_micro_batch
        self._baseline: float | None = None

    @torch.no_grad()
    def logprobs(self, model: PreTrainedModel) -> list[np.ndarray]:
        """The trainer's logprobs of the tokens of each completion."""
        found: list[np.ndarray] = [np.empty(0)] * len(self.sequences)
        lengths = [len(sequence) for sequence in self.sequences]
        with evaluating(model):
            for group in cut_by_padded_tokens(lengths, self._tokens, boundary=rope_switch(model)):
                scored = self._score(model, group)
                for index, part in zip(
                    group, np.split(scored, np.cumsum([self._lengths[i] for i in group])[:-1]), strict=True
                ):
                    found[index] = part
        return found

    def _score(self, model: PreTrainedModel, group: list[int]) -> np.ndarray:
        sequences, lengths = [self.sequences[i] for i in group], [self._lengths[i] for i in group]
        input_ids, device = pad_rows(sequences), model.device
        prompt_lengths = [len(s) - length for s, length in zip(sequences, lengths, strict=True)]
        positions = predicting_positions(prompt_lengths, lengths, input_ids.shape[1])
        tokens = [sequence[-length:] for sequence, length in zip(sequences, lengths, strict=True)]
        token_ids = torch.tensor([token for row in tokens for token in row], device=device)
        output = student_logprobs(
            model,
            input_ids.to(device),
            positions.to(device),
            token_ids,
            token_ids.unsqueeze(-1),
            temperature=1.0,
            compute_dtype=self._compute_dtype,
        )
        return output.token_logprobs.float().cpu().numpy()

    def residual(self, ours: list[np.ndarray], theirs: list[list[float]]) -> float:
        """How far an engine's logprobs are from the trainer's: the largest difference in float32, in half precision the mean.

        Args:
            theirs: for each sequence, the logprobs of all its tokens but the first.

        Raises:
            WeightSyncError: they are not of these sequences.
        """
        if [len(row) for row in theirs] != [len(sequence) - 1 for sequence in self.sequences]:
            raise WeightSyncError("the canary's logprobs are not those of its tokens")
        scored = [np.asarray(row[-length:]) for row, length in zip(theirs, self._lengths, strict=True)]
        differences = np.abs(np.concatenate(ours) - np.concatenate(scored))
        return float(differences.max() if self._dtype == "float32" else differences.mean())

    def check(self, residual: float, where: str) -> None:
        """Compare a residual with what may be.

        Args:
            where: version and server, for the error.

        Raises:
            WeightSyncError: it is larger, or no number.
        """
        tolerance = self.tolerance
        if not residual <= tolerance:
            raise WeightSyncError(
                f"canary of {where}: its logprobs differ from the trainer's by {residual:.2g}, more than {tolerance:.2g} "
                f"({self._dtype}); the server holds other weights than the trainer sent"
            )

    def calibrate(self, residual: float) -> None:
        """What version 0 has shown; a later call changes nothing."""
        if self._baseline is None:
            self._baseline = residual

    @property
    def tolerance(self) -> float:
        """weight_sync.canary_tolerance, or what version 0 showed times a margin, between the floor and the ceiling."""
        if self._tolerance is not None:
            return self._tolerance
        kind = "float32" if self._dtype == "float32" else "half"
        if self._baseline is None:
            return _CEILINGS[kind]
        return min(max(_FLOORS[kind], _MARGIN * self._baseline), _CEILINGS[kind])
