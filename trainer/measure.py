"""Measuring a student without training it."""

from services.config import RunConfig
from services.errors import ConfigError, EvaluationError
from services.process.signals import interruptible
from trainer.evaluation.evaluate import Evaluation
from trainer.following import follow
from trainer.open_session import open_session
from trainer.ranks.group import join_ranks
from trainer.user_objects import NOTHING, UserObjects


def measure(config: RunConfig, objects: UserObjects = NOTHING) -> Evaluation | None:
    """What the student can do on the held-out prompts, under weights that are pushed first; None on ranks but the first.

    Raises:
        DistillServeError: as of `train`; an EvaluationError if it cannot be measured.
    """
    if not config.data.has_held_out_rows:
        raise ConfigError(
            "an evaluation needs held-out prompts; give eval_dataset, data.eval_path, data.eval_split or data.held_out"
        )
    with interruptible() as interruption:
        ranks = join_ranks(config)
        if ranks.index > 0:
            follow(ranks, objects.optimizers)
            return None
        with open_session(config, interruption, ranks, objects) as run:
            run.push(0)
            objects.begun()
            evaluation = run.evaluate(step=0)
            if evaluation is None:
                raise EvaluationError(f"the student was not measured: {run.failed_evaluations[-1].reason}")
            return evaluation
