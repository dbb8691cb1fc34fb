"""A run between its first and its last step: what train.py's loop asks for by name."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.config import RunConfig
from services.errors import DistillServeError, EvaluationError, RankLostError, WeightsWantedError
from services.process.event_loop import EventLoopThread
from services.process.signals import Interrupted, Interruption
from services.wire.batch import TrainingBatch
from trainer.callbacks.callback import Callback, RunControl, RunState
from trainer.callbacks.run_callbacks import RunCallbacks
from trainer.evaluation.evaluate import Evaluation, Evaluator
from trainer.feed import BatchFeed
from trainer.learner import Learner
from trainer.output.progress import Progress
from trainer.output.report import FailedEvaluation, RunRecord, Summary
from trainer.output.saving import SavedStudents
from trainer.pipeline import Pipeline
from trainer.staleness_buffer import staleness
from trainer.weights.weight_sync import WeightSync

logger = logging.getLogger(__name__)

# An evaluation during which rollout servers are started again more often is given up.
_MOST_REPEATED_EVALUATIONS = 2


@dataclass
class Session:
    config: RunConfig
    num_steps: int
    interruption: Interruption
    event_loop: EventLoopThread
    learner: Learner
    pipeline: Pipeline
    weights: WeightSync
    evaluator: Evaluator | None
    record: RunRecord
    students: SavedStudents
    progress: Progress
    callbacks: Sequence[Callback] = ()
    failed_evaluations: list[FailedEvaluation] = field(default_factory=list)
    num_tokens: int = 0
    step_began: float = 0.0

    def __post_init__(self) -> None:
        self.feed = BatchFeed(self._next_document)
        learner, control = self.learner, RunControl(can_evaluate=self.evaluator is not None)
        state = RunState(
            self.config,
            self.num_steps,
            learner.student.model,
            self.record.tokenizer,
            learner.optimizer,
            learner.schedule,
        )
        self._events = RunCallbacks(self.callbacks, state, control)

    def _next_document(self) -> bytes:
        self._tell("on_step_begin")
        while (document := self.event_loop.run(self.pipeline.next)) is None:
            step = self.learner.finished_step
            logger.info("the rollout servers were started again: they are sent the weights of step %d", step)
            self.push(step)
        return document

    def _tell(self, event: str, **changes: Any) -> None:
        """The callbacks, which a Ctrl-C may end.

        Raises:
            UserCodeError: one of them failed.
        """
        with self.interruption.raising():
            self._events.tell(event, **changes)

    def telling_its_end(self) -> AbstractContextManager[None]:
        """However the block ends, the callbacks hear of it."""
        return self._events.until_the_end()

    def steps(self) -> Iterator[int]:
        """The steps to train: all, or up to where a callback asks to stop."""
        for step in range(1, self.num_steps + 1):
            if self._events.control.is_stopping:
                logger.info("a callback asked to stop after step %d of %d", step - 1, self.num_steps)
                return
            yield step

    def begin(self) -> None:
        """Push version 0; then this run's files replace those of an earlier one."""
        self._tell("on_start")
        with self.progress.doing("sending the student's weights for the first time"):
            self.push(0)
        self._tell("on_push", policy_version=0)
        self.record.begin()
        self.step_began = self.record.wall_s

    def push(self, version: int) -> dict[str, float]:
        """Make the student's weights live on every rollout server; returns what the push cost.

        Raises:
            WeightSyncError: the push failed twice, or another run has taken a server over.
        """
        canary = self.event_loop.run(self.weights.canary)
        snapshot = self.learner.snapshot(version, self.weights.rollout_dtype, canary)
        return self.event_loop.run(self.pipeline.publish, snapshot)

    def finish_step(self, step: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """The student holds the step: save it where it is due, push it, write it down.

        Raises:
            WeightSyncError: the push failed twice, or another run has taken a server over.
            OutputError: a file cannot be written.
            UserCodeError: a callback failed.
        """
        saved = self.students.step_finished(step, self.learner.state)
        try:
            metrics = metrics | self.push(step)
        finally:  # a step whose push fails was trained all the same
            row = self._record_step(step, batch, metrics)
        self._tell("on_push", step=step, policy_version=step, metrics=row)
        self._tell("on_step_end")
        is_asked = self._events.control.take("save")
        if saved is None and is_asked:
            saved = self.students.keep(step, self.learner.state())
        if saved is not None:
            self._tell("on_save", student_folder=saved)

    @contextmanager
    def saving_the_student(self) -> Iterator[None]:
        """However the block ends, the student of the last finished step is on disk afterwards.

        Raises:
            OutputError: it cannot be written; where the block failed as well, its own error.
        """
        try:
            yield
        except BaseException as reason:
            if step := self.learner.finished_step:
                if isinstance(reason, RankLostError):
                    self.interruption.end()  # of the same, which another thread has heard of as well
                elif isinstance(reason, Interrupted):
                    logger.info("%s: saving the student of step %d, which a second Ctrl-C gives up", reason, step)
                try:
                    with self.interruption.raising():
                        self._save()
                except (Exception, Interrupted) as error:
                    logger.error("the student of step %d is lost: %s", step, error)
            raise
        if (folder := self._save()) is not None:
            self._tell("on_save", student_folder=folder)

    def _save(self) -> Path | None:
        """The student's folder; None without a step, unless that is what a callback wants."""
        state = self.learner.state()
        return self.students.save(state) if state.step or self._events.control.is_stopping else None

    def is_evaluated(self, step: int) -> bool:
        """Whether the student is measured after a step that is not the last one."""
        every, control = self.config.evaluation.every_steps, self._events.control
        is_due = control.take("evaluate") or (every > 0 and step % every == 0)
        return is_due and step < self.num_steps and not control.is_stopping

    def evaluate(self, step: int) -> Evaluation | None:
        """Measure the student on the held-out prompts; None when there are none, or when it cannot be done, which is a
        warning: a measurement must not cost what was trained."""
        if self.evaluator is None:
            return None
        try:
            evaluation = self._measure(self.evaluator, step)
        except Exception as error:
            is_known = isinstance(error, DistillServeError)
            reason = str(error) if is_known else f"{type(error).__name__}: {error}"
            text = "the evaluation after step %d failed, training is not affected: %s"
            logger.warning(text, step, reason, exc_info=not is_known)
            self.failed_evaluations.append(FailedEvaluation(step, reason))
            return None
        finally:
            self.step_began = self.record.wall_s  # the time of a step is without the evaluation before it
        self.record.evaluation(step, evaluation)
        self.progress.evaluated(step, evaluation.exact_match, evaluation.reverse_kl)
        self._tell("on_evaluate", step=step, evaluation=evaluation)
        return evaluation

    def _measure(self, evaluator: Evaluator, step: int) -> Evaluation:
        """The evaluation; where a rollout server was started again meanwhile, all of it once more under the right weights.

        Raises:
            PeerError: a server failed, or was started again time after time.
            WeightSyncError: it did not take the weights.
        """
        for _ in range(_MOST_REPEATED_EVALUATIONS):
            try:
                return self._measure_once(evaluator, step)
            except WeightsWantedError as error:
                logger.warning("the evaluation after step %d is made again: %s", step, error)
                self.push(step)
        return self._measure_once(evaluator, step)

    def _measure_once(self, evaluator: Evaluator, step: int) -> Evaluation:
        with self.progress.doing(f"evaluating the student after step {step}"), self.interruption.raising():
            return evaluator.evaluate(self.learner, policy_version=step)

    def _record_step(self, step: int, batch: TrainingBatch, metrics: dict[str, float]) -> dict[str, float]:
        """One row of metrics, which is returned, a few samples now and then."""
        num_tokens, wall_s = int(batch.counts().sum()), self.record.wall_s
        self.num_tokens += num_tokens
        row = metrics | batch.metrics
        row |= {
            "staleness": staleness(batch.policy_versions.tolist(), step - 1),
            "num_steps": self.num_steps,
            "rollout_tokens_per_s": num_tokens / row["rollout_s"],
            "teacher_tokens_per_s": num_tokens / row["teacher_s"],
            "trainer_tokens_per_s": num_tokens / row["train_s"],
            "step_s": wall_s - self.step_began,
            "wall_s": wall_s,
        }
        self.step_began = wall_s
        self.record.step(step, row)
        self.record.samples(step, batch)
        self.progress.step({"step": step, **row})
        return row

    def finish(self, before: Evaluation | None, after: Evaluation | None) -> Summary:
        """Write the summary, show the table.

        Raises:
            EvaluationError: the run is complete, but an evaluation failed.
        """
        failed = self.failed_evaluations
        summary = Summary(before, after, self.learner.finished_step, self.record.wall_s, self.num_tokens, failed)
        self.record.finish(summary)
        self.students.write_card()
        if failed:
            steps = ", ".join(str(one.step) for one in failed)
            raise EvaluationError(
                f"training is complete and the student saved in {self.record.dir / 'student'}, but the evaluation after "
                f"step {steps} failed: {failed[-1].reason}"
            )
        return summary
