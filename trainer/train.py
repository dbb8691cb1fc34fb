"""The algorithm: on-policy distillation, a step at a time.

    pipeline.py   prompts ─► rollout servers ─► teachers ─► buffer       waits for a free slot, then for the servers
    train()       buffer ─► loss ─► optimizer ─► push weights            waits for a batch, then for the push
                                                    └─► frees a slot     unblocks the pipeline

The pipeline works in an event loop of its own, in a second thread; only this one trains the student. `StalenessBuffer` decides
how far the two may be apart: with max_staleness 0 they take turns, and an asynchronous run would be the same with more slots.
"""

from services.config import RunConfig
from services.process.signals import interruptible
from trainer.following import follow
from trainer.open_session import open_session
from trainer.output.report import Summary
from trainer.ranks.group import join_ranks
from trainer.session import Session
from trainer.user_objects import NOTHING, UserObjects


def train(config: RunConfig, objects: UserObjects = NOTHING) -> Summary | None:
    """Run the whole job; the servers must be up or coming up.

    On several ranks the first one does all of this, and every call of its learner is made on all of them; the others return
    None at the end.

    However it ends after the first step, short of being killed, the student of the last finished step is in output.dir, and a
    checkpoint of it, from which the same call goes on (docs/checkpoints.md). A killed run goes on from its last checkpoint.

    Args:
        objects: callbacks and other objects of the program that trains; of a run from the command line none.

    Raises:
        DistillServeError: whatever a user can act on, see services/errors.py; the run is complete if it is an
            EvaluationError.
        Interrupted: SIGINT, SIGTERM or SIGHUP came, which end the run in order where this is the main thread.
    """
    with interruptible() as interruption:
        ranks = join_ranks(config)
        if ranks.index > 0:
            follow(ranks, objects.optimizers)
            return None
        with open_session(config, interruption, ranks, objects) as run, run.telling_its_end():
            return _train(run)


def _train(run: Session) -> Summary:
    with run.saving_the_student():
        run.begin()
        before = run.evaluate_before()
        for step in run.steps():
            batch = run.feed.next()
            metrics = run.learner.step(batch)
            run.finish_step(step, batch, metrics)
            if run.is_evaluated(step):
                run.evaluate(step)
    after = run.evaluate(step=run.learner.finished_step)
    return run.finish(before, after)
