"""The distance of the student to a frozen reference: the student as the run found it."""

from torch import Tensor

# As in importance.py: beyond exp(20) a ratio says only that two policies have nothing in common.
_MAX_LOG_RATIO = 20.0


def reference_kl(token_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """[N] the estimate k3 = p_ref / q - 1 - log(p_ref / q) of KL(q || p_ref) from the sampled token, with gradient.

    Never negative, and 0 with a gradient of 0 where the two agree (Schulman's k3; GRPO, arXiv 2402.03300, eq. 4).

    Args:
        token_logprobs: [N] log q of the sampled tokens, with gradient.
        reference_logprobs: [N] the same of the reference.
    """
    log_ratio = reference_logprobs.detach() - token_logprobs
    return log_ratio.clamp(max=_MAX_LOG_RATIO).expm1() - log_ratio
