"""Options that do what they say, and seldom what was wanted: said once, at the start of a run."""

import logging

from services.config import LossConfig, RunConfig

logger = logging.getLogger(__name__)

# Nearer to an end than this, the gradient of the Jensen-Shannon divergence is less than a tenth of that at the end.
_JSD_END = 0.1


def warn_of_options(config: RunConfig) -> None:
    """Log a line for each of them, and one where weights are held twice."""
    _tell_of_second_copy(config)
    for warning in (_master_weights(config), _jsd_near_an_end(config.loss)):
        if warning is not None:
            logger.warning(warning)


def _tell_of_second_copy(config: RunConfig) -> None:
    """Log it where the teacher is the student's own model: roles share no process, so they share no weights."""
    if config.teacher.model is not None and config.teacher.model == config.student.model:
        logger.info(
            "the teacher is the student's own model, %s: its server is a process of its own and holds a second copy of it",
            config.teacher.model,
        )


def _master_weights(config: RunConfig) -> str | None:
    if config.master_dtype() != "bfloat16" or config.lora.is_on:
        return None
    return (
        "student.dtype = bfloat16: a step that is smaller than half the distance to the next bfloat16 number is lost (in 12 "
        "steps 3 % of the weights move at optimizer.learning_rate = 1e-5, 0.4 % at 1e-6); float32 keeps them all"
    )


def _jsd_near_an_end(loss: LossConfig) -> str | None:
    beta = loss.jsd_beta
    if loss.single_step_divergence != "jsd" or not (0 < beta < _JSD_END or 1 - _JSD_END < beta < 1):
        return None
    end, kind = (0, "forward_kl") if beta < 0.5 else (1, "reverse_kl")
    return (
        f"loss.jsd_beta = {beta}: the gradient is about {beta * (1 - beta):.2g} of that of {kind}, which loss.jsd_beta = {end} is; "
        f"take {end}, or a value between {_JSD_END} and {1 - _JSD_END}"
    )
