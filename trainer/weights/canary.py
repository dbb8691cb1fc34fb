"""Given tokens that the trainer and every engine score after each push: whether both hold the same weights.

The checksums of a push say that the bytes arrived; the canary says that they are where they belong. What two implementations
round differently, version 0 shows, and later versions may show a few times that. But wrong weights at version 0 must not
calibrate themselves, so there is a ceiling that no rounding reaches.
"""

import numpy as np

from services.config import WeightSyncConfig
from services.errors import WeightSyncError
from trainer.weights.snapshot import GivenTokens

NEW_TOKENS = 8
"""That a server samples for each canary, once; they are what is compared."""
PROMPT_TOKENS = 8
"""Of the end of a prompt. Weights in a wrong place show at every token, and each costs time at every push."""
RENEWED_AFTER = 10
"""Pushes after which the tokens are sampled anew: a student of a few hundred steps hardly writes what it wrote at first."""

# The largest difference in float32; in half precision the mean, for single tokens differ by more.
_FLOORS = {"float32": 1e-4, "half": 0.05}
_CEILINGS = {"float32": 1e-2, "half": 0.1}
_MARGIN = 3.0


class Canary:
    """Prompts with completions that the student itself has sampled: at tokens it would not write, both sides round more.

    Args:
        given: what both sides score; may be replaced by what the student has sampled since.
        dtypes: of the rollouts and of the student's products.
    """

    def __init__(self, config: WeightSyncConfig, given: GivenTokens, dtypes: tuple[str, str]) -> None:
        self.given = given
        self._tolerance = config.canary_tolerance
        self._dtype = next((dtype for dtype in dtypes if dtype != "float32"), "float32")
        self._baseline: float | None = None

    def residual(self, ours: list[np.ndarray], theirs: list[list[float]]) -> float:
        """How far an engine's logprobs are from the trainer's: the largest difference in float32, in half precision the mean.

        Args:
            theirs: for each sequence, the logprobs of all its tokens but the first.

        Raises:
            WeightSyncError: they are not of these sequences.
        """
        if [len(row) for row in theirs] != [len(sequence) - 1 for sequence in self.given.sequences]:
            raise WeightSyncError("the canary's logprobs are not those of its tokens")
        pairs = zip(theirs, self.given.completions, strict=True)
        scored = [np.asarray(row[-len(completion) :]) for row, completion in pairs]
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
