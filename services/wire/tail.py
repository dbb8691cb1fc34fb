"""The mass outside a top-k, from the top-k alone: what vLLM reports."""

import numpy as np

# One minus a sum of float32 probabilities: below this it is rounding.
_LEAST_TAIL = 1e-6


def log_mass_left(logprobs: np.ndarray) -> np.ndarray:
    """[...] log of one minus the mass of `logprobs` [..., K]; never below log(1e-6), under which it would be rounding."""
    mass = np.exp(logprobs.astype(np.float64)).sum(-1)
    return np.log(np.maximum(1.0 - mass, _LEAST_TAIL))
