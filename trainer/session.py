"""A run between its first and its last step: what train.py's loop asks for by name."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from services.config import RunConfig
from services.errors import DistillServeError, EvaluationError, OutputError, RankLostError, WeightsWantedError
from services.process.event_loop import EventLoopThread
from services.process.signals import Interrupted, Interruption
from services.wire.batch import TrainingBatch
from trainer.callbacks.callback import Callback, RunControl, RunState
from trainer.callbacks.run_callbacks import RunCallbacks
from trainer.checkpoint.plain_values import from_json, to_json
from trainer.evaluation.evaluate import Evaluation, Evaluator
from trainer.feed import BatchFeed
from trainer.learner import Learner
from trainer.output.checkpoints import Checkpoints
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
    """A run.

    Attributes:
        facts: what every checkpoint says of the run.
        resumed: what the checkpoint says after which it goes on; None: it begins.
        begun: told when its files have taken the place of those of an earlier one.
    """

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
    checkpoints: Checkpoints
    progress: Progress
    facts: Mapping[str, Any] = field(default_factory=dict)
    resumed: Mapping[str, Any] | None = None
    callbacks: Sequence[Callback] = ()
    begun: Callable[[], None] = lambda: None
    failed_evaluations: list[FailedEvaluation] = field(default_factory=list)
    num_tokens: int = 0
    step_began: float = 0.0

    def __post_init__(self) -> None:
        self.feed = BatchFeed(self._next_document)
        self._before: Evaluation | None = None
        self._positions: dict[str, int] = {"prompts": 0, "texts": 0}
        self._recorded = self._first = self.learner.finished_step
        self._checkpoint_s: float | None = None
        self._has_begun = self._are_servers_waiting = False
        if self.resumed is not None:
            self.num_tokens, self._positions = self.resumed["num_tokens"], dict(self.resumed["positions"])
            before = from_json(self.resumed["before"])
            self._before = None if before is None else Evaluation(**before)
            self.failed_evaluations = [FailedEvaluation(**one) for one in self.resumed["failed_evaluations"]]
        learner, control = self.learner, RunControl(can_evaluate=self.evaluator is not None)
        state = RunState(
            self.config,
            self.num_steps,
            learner.student.model,
            self.record.tokenizer,
            learner.optimizer,
            learner.schedule,
            step=learner.finished_step,
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
        for step in range(self._first + 1, self.num_steps + 1):
            if self._events.control.is_stopping:
                logger.info("a callback asked to stop after step %d of %d", step - 1, self.num_steps)
                return
            yield step

    def begin(self) -> None:
        """Push the weights that the run begins with; then its files replace those of an earlier one, or go on."""
        self._tell("on_start")
        with self.progress.doing("sending the student's weights for the first time"):
            self.push(self._first)
        self._tell("on_push", policy_version=self._first)
        with self.interruption.raising():
            self.checkpoints.rehearse()
        self.record.open_trackers()
        self.checkpoints.begin()
        self.record.begin()
        self._has_begun = True
        self.begun()
        self.step_began = self.record.wall_s

    def push(self, version: int) -> dict[str, float]:
        """Make the student's weights live on every rollout server; returns what the push cost.

        Raises:
            WeightSyncError: the push failed twice, or another run has taken a server over.
        """
        canary = self.event_loop.run(self.weights.canary)
        snapshot = self.learner.snapshot(version, self.weights.rollout_dtype, canary)
        self._are_servers_waiting = True  # for the push that is whole: until then they sample nothing
        costs = self.event_loop.run(self.pipeline.publish, snapshot)
        self._are_servers_waiting = False
        return costs

    def finish_step(self, step: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """The student holds the step: save it where it is due, push it, write it down.

        Raises:
            WeightSyncError: the push failed twice, or another run has taken a server over.
            OutputError: a file cannot be written.
            UserCodeError: a callback failed.
        """
        try:
            self.students.step_finished(self.learner.state)
            metrics = metrics | self.push(step)
        finally:  # a step whose push fails was trained all the same
            row = self._record_step(step, batch, metrics)
        self._tell("on_push", step=step, policy_version=step, metrics=row)
        self._tell("on_step_end")
        if step == self._first + 1 and self.checkpoints.are_made:
            self.learner.check_capture()
        self.checkpoints.check()
        is_asked = self._events.control.take("save")
        if is_asked or self.checkpoints.is_due(step):
            saved = self._checkpoint()
            if self.callbacks:  # who is told of it may look at it
                self._wait_for_checkpoint()
                self._tell("on_save", student_folder=saved)

    def _checkpoint(self) -> Path:
        """Have the run as it is after the last step written down; returns where.

        Raises:
            OutputError: it, or the one before, cannot be written.
        """
        self._wait_for_checkpoint()
        started = time.monotonic()
        state = {
            "policy_version": self.learner.finished_step,
            "positions": self._positions,
            "num_tokens": self.num_tokens,
            "wall_s": self.record.wall_s,
            "before": to_json(None if self._before is None else asdict(self._before)),
            "failed_evaluations": [asdict(failed) for failed in self.failed_evaluations],
        }
        path = self.checkpoints.make(self.learner.finished_step, {**self.facts, **state})
        self._checkpoint_s = time.monotonic() - started
        return path

    def _wait_for_checkpoint(self) -> None:
        with self.interruption.raising():
            self.checkpoints.wait()

    @contextmanager
    def saving_the_student(self) -> Iterator[None]:
        """However the block ends after the run has begun, the student of the last finished step is on disk afterwards.

        Raises:
            OutputError: it cannot be written; where the block failed as well, its own error.
        """
        try:
            yield
        except BaseException as reason:
            if self._has_begun and (step := self.learner.finished_step):
                if isinstance(reason, RankLostError):
                    self.interruption.end()  # of the same, which another thread has heard of as well
                elif isinstance(reason, Interrupted):
                    logger.info("%s: saving the student of step %d, which a second Ctrl-C gives up", reason, step)
                try:
                    with self.interruption.raising():
                        self._save()
                except (Exception, Interrupted) as error:
                    logger.error("the student of step %d is lost: %s", step, error)
            self._leave_checkpoint(reason)
            raise
        if (folder := self._save()) is not None:
            self._tell("on_save", student_folder=folder)
        if self.checkpoints.are_made and self.learner.finished_step:
            self._last_checkpoint()

    def _last_checkpoint(self) -> None:
        """All steps are done, and the student is saved: a failure is a warning."""
        try:
            self._checkpoint()
            self._wait_for_checkpoint()
        except OutputError as error:
            logger.warning("%s", error)

    def _leave_checkpoint(self, reason: BaseException) -> None:
        """Before the run ends for a reason: a checkpoint of its last step, where there can be one, and how to go on."""
        step, checkpoints = self.learner.finished_step, self.checkpoints
        is_whole = (
            step and self._recorded == step and not isinstance(reason, RankLostError) and self.learner.can_be_captured
        )
        try:
            with self.interruption.raising():
                if checkpoints.are_made and is_whole:
                    logger.info("writing the checkpoint of step %d, which a second Ctrl-C gives up", step)
                    self._checkpoint()
                checkpoints.wait()
        except (Exception, Interrupted) as error:
            logger.warning("there is no checkpoint of step %d: %s", step, error)
        if (newest := checkpoints.newest) is not None:
            output, words = self.config.output, "the same command"
            if self._has_begun and (output.overwrite or output.resume_step is not None):
                instead = "--output.overwrite" if output.overwrite else "--output.resume_step"
                words += f" with --resume in the place of {instead}"
            reason.add_note(f"{words} goes on after step {newest.name.removeprefix('step-')}, from {newest}")

    def _save(self) -> Path | None:
        """The student's folder; None without a step, unless that is what a callback wants."""
        state = self.learner.state()
        return self.students.save(state) if state.step or self._events.control.is_stopping else None

    def evaluate_before(self) -> Evaluation | None:
        """Measure the student before the first step. A run that goes on has done so, but maybe not what was due after its
        last step."""
        if self._first == 0:
            self._before = self.evaluate(step=0)
        elif self.is_evaluated(self._first) and self._first not in self.record.reverse_kls:
            self.evaluate(self._first)
        return self._before

    def is_evaluated(self, step: int) -> bool:
        """Whether the student is measured after a step that is not the last one."""
        every = self.config.evaluation.every_steps
        is_due = self._events.control.take("evaluate") or (every > 0 and step % every == 0)
        return is_due and self._goes_on(step)

    def _goes_on(self, step: int) -> bool:
        """Whether there is a step after this one."""
        return step < self.num_steps and not self._events.control.is_stopping

    def evaluate(self, step: int) -> Evaluation | None:
        """Measure the student on the held-out prompts; None when there are none, or when it cannot be done, which is a
        warning: a measurement must not cost what was trained.

        Raises:
            OutputError: a row, or the checkpoint of the best student so far, cannot be written; the latter not after the last step.
            DistillServeError: of a push that failed in it, where the next step needs the servers.
        """
        if self.evaluator is None:
            return None
        try:
            evaluation = self._measure(self.evaluator, step)
        except Exception as error:
            if self._are_servers_waiting and self._goes_on(step):
                raise
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
        if self.checkpoints.evaluated(step, evaluation.reverse_kl):
            self._checkpoint() if self._goes_on(step) else self._last_checkpoint()
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
        """What was used, one row of metrics, which is returned, a few samples now and then."""
        num_tokens, wall_s = int(batch.counts().sum()), self.record.wall_s
        self.num_tokens += num_tokens
        self.record.used(step, batch)
        if batch.used:
            self._positions = {name: batch.used[name][1] for name in self._positions}
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
        if self._checkpoint_s is not None:  # of the one after the step before: it is a part of step_s
            row["checkpoint_s"], self._checkpoint_s = self._checkpoint_s, None
        self.step_began = wall_s
        self.record.step(step, row)
        self.record.samples(step, batch)
        self.progress.step({"step": step, **row})
        self._recorded = step
        return row

    def finish(self, before: Evaluation | None, after: Evaluation | None) -> Summary:
        """Write the summary, show the table.

        Raises:
            EvaluationError: the run is complete, but an evaluation failed.
        """
        failed = self.failed_evaluations
        steps, attempts = self.learner.finished_step, self.record.attempt.number
        summary = Summary(before, after, steps, self.record.wall_s, self.num_tokens, failed, attempts)
        self.record.finish(summary)
        self.students.write_card()
        if failed:
            steps_of = ", ".join(str(one.step) for one in failed)
            raise EvaluationError(
                f"training is complete and the student saved in {self.record.dir / 'student'}, but the evaluation after "
                f"step {steps_of} failed: {failed[-1].reason}"
            )
        return summary
