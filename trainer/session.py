"""Everything a run holds between its first and its last step: models, clients, buffer, record."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from services.clients import RolloutClient, TeacherClient
from services.clients.plain_vllm import VllmTeacherClient
from services.config import RunConfig
from services.config.keys import Secrets, reveal
from services.errors import ConfigError, DistillServeError, EvaluationError
from services.gpus.cards import check_driver
from services.gpus.options import computed
from services.models.causal_lm import eos_token_ids_on_disk, load_tokenizer
from services.process.folder_lock import lock_folder
from services.process.signals import Interruption
from services.wire.batch import TrainingBatch
from services.wire.rollout import RolloutInfo
from trainer.attach import preflight
from trainer.attach.option_warnings import warn_of_options
from trainer.data.prompts import Prompt, PromptRows, read_prompts
from trainer.data.stream import RowStream
from trainer.data.text_limits import TextLimits
from trainer.data.texts import check_windows_fit, load_texts
from trainer.evaluation.evaluate import Evaluation, Evaluator
from trainer.evaluation.exact_match import check_answers
from trainer.learner import Learner
from trainer.output.progress import Progress
from trainer.output.report import FailedEvaluation, RunRecord, Summary
from trainer.output.saving import SavedStudents
from trainer.parallel import compute_dtype_of
from trainer.staleness_buffer import StalenessBuffer
from trainer.student import load_student
from trainer.teacher_scores import Quarantine, Support
from trainer.teachers import Teachers, teacher_urls
from trainer.weights.weight_sync import WeightSync

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass
class Session:
    config: RunConfig
    learner: Learner
    prompts: RowStream[Prompt]
    num_steps: int
    support: Support
    rollout_client: RolloutClient
    teachers: Teachers
    buffer: StalenessBuffer[bytes]
    weights: WeightSync
    evaluator: Evaluator | None
    quarantine: Quarantine
    record: RunRecord
    students: SavedStudents
    failed_evaluations: list[FailedEvaluation] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    num_tokens: int = 0
    last_wall_s: float = 0.0

    def evaluates_at(self, step: int) -> bool:
        every = self.config.evaluation.every_steps
        return every > 0 and step % every == 0 and step < self.num_steps

    async def begin(self) -> None:
        """Make the servers' weights ours from the first token on; then this run's files replace those of an earlier one."""
        with self.progress.doing("sending the student's weights for the first time"):
            await self.publish(0)
        self.record.begin()

    async def publish(self, version: int) -> dict[str, float]:
        """Make the student's weights live on every rollout server; returns what the push cost.

        Raises:
            WeightSyncError: the push failed twice.
        """
        canary = await self.weights.canary()
        return await self.weights.publish(
            await self.to_the_end(self.learner.snapshot, version, self.weights.rollout_dtype, canary)
        )

    async def to_the_end(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `work`, run in a thread; who is cancelled meanwhile leaves only when the thread has, so that
        nothing changes the model any more."""
        # No task, which would be cancelled with all others when the loop is left in a hurry.
        thread = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            self.learner.stop()
            while not thread.done():
                with suppress(asyncio.CancelledError):  # whoever is in a hurry: half a step is worth nothing
                    await asyncio.wait([thread])
            thread.exception()  # how it left is of no interest, and asyncio prints what nobody has asked for
            raise

    @contextmanager
    def saving_the_student(self) -> Iterator[None]:
        """However the block ends, the student of the last finished step is on disk afterwards.

        Raises:
            OutputError: it cannot be written; where the block failed as well, its own error.
        """
        try:
            yield
        except BaseException:
            if self.learner.finished_step:
                try:
                    self.students.save(self.learner.finished_step)
                except Exception as error:
                    logger.error("the student of step %d is lost: %s", self.learner.finished_step, error)
            raise
        self.students.save(self.learner.finished_step)

    async def evaluate(self, step: int) -> Evaluation | None:
        """Measure the student on the held-out prompts; None when there are none, or when it cannot be done, which is a
        warning: a measurement must not cost what was trained."""
        if self.evaluator is None:
            return None
        try:
            with self.progress.doing(f"evaluating the student after step {step}"):
                evaluation = await self.evaluator.evaluate(self.learner, self.buffer.version)
        except Exception as error:
            is_known = isinstance(error, DistillServeError)
            reason = str(error) if is_known else f"{type(error).__name__}: {error}"
            text = "the evaluation after step %d failed, training is not affected: %s"
            logger.warning(text, step, reason, exc_info=not is_known)
            self.failed_evaluations.append(FailedEvaluation(step, reason))
            return None
        finally:
            self.last_wall_s = self.record.wall_s  # the time of a step is without the evaluation before it
        self.record.evaluation(step, evaluation)
        self.progress.evaluated(step, evaluation.exact_match, evaluation.reverse_kl)
        return evaluation

    def record_step(
        self, step: int, batch: TrainingBatch, metrics: dict[str, float], *, staleness: int, train_s: float
    ) -> None:
        """One row of metrics, a few samples now and then."""
        num_tokens = len(batch.token_ids)
        self.num_tokens += num_tokens
        row = metrics | batch.metrics
        row |= {
            "staleness": staleness,
            "num_steps": self.num_steps,
            "train_s": train_s,
            "rollout_tokens_per_s": num_tokens / row["rollout_s"],
            "teacher_tokens_per_s": num_tokens / row["teacher_s"],
            "trainer_tokens_per_s": num_tokens / train_s,
            "step_s": self.record.wall_s - self.last_wall_s,
            "wall_s": self.record.wall_s,
        }
        self.last_wall_s = self.record.wall_s
        self.record.step(step, row)
        self.record.samples(step, batch)
        self.progress.step({"step": step, **row})

    def finish(self, before: Evaluation | None, after: Evaluation | None) -> Summary:
        """Write the summary, show the table.

        Raises:
            EvaluationError: the run is complete, but an evaluation failed.
        """
        failed = self.failed_evaluations
        summary = Summary(before, after, self.num_steps, self.record.wall_s, self.num_tokens, failed)
        self.record.finish(summary)
        if failed:
            steps = ", ".join(str(one.step) for one in failed)
            raise EvaluationError(
                f"training is complete and the student saved in {self.record.dir / 'student'}, but the evaluation after "
                f"step {steps} failed: {failed[-1].reason}"
            )
        return summary


@asynccontextmanager
async def open_session(config: RunConfig, interruption: Interruption | None = None) -> AsyncIterator[Session]:
    """Check everything, attach to the servers, load the student; close all of it at the end.

    Args:
        interruption: deferred once the session is open: until then there is nothing to bring to an end.

    Raises:
        DistillServeError: whatever a user can act on, before the first weight is changed.
    """
    config.require("train")
    async with AsyncExitStack() as stack:
        stack.enter_context(lock_folder(Path(config.output.dir), "output.dir", "`distillserve train`"))
        progress = stack.enter_context(Progress())
        with progress.doing("reading the data and loading the student"):
            session = await _open(config, progress, stack)
        if interruption is not None:
            interruption.defer()
        yield session


async def _open(config: RunConfig, progress: Progress, stack: AsyncExitStack) -> Session:
    Secrets().check()  # before the model is loaded
    on_gpu = torch.cuda.is_available()
    check_driver(on_gpu)
    config = computed(config, "trainer")
    accelerator = Accelerator(
        cpu=not on_gpu, log_with=list(config.output.trackers) or None, project_dir=config.output.dir
    )
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"launched with {accelerator.num_processes} processes, but this version trains in one; start it without torchrun"
        )
    set_seed(config.seed)
    warn_of_options(config)
    name, trust = config.student.model or "", config.student.trust_remote_code
    tokenizer = load_tokenizer(name, trust_remote_code=trust, key="student.model")
    record = RunRecord(config, accelerator, tokenizer)
    end_token_ids = eos_token_ids_on_disk(name, tokenizer, trust_remote_code=trust)
    files = _read_files(config, tokenizer, end_token_ids)  # a broken file must not wait for the servers to be reported
    student = load_student(
        config.student,
        compute_dtype=compute_dtype_of(config, accelerator.device),
        checkpointing=config.uses_gradient_checkpointing(on_gpu=on_gpu),
    )
    check_windows_fit(files.texts, student.model.config.get_text_config())
    with progress.doing("waiting for the servers"):
        servers = await _attach(config, files, stack)
    preflight.check_rope_switch(student.rope_switch, servers.rollout_client.urls, servers.rollouts)
    await preflight.check_teachers(config, tokenizer, end_token_ids, servers.teachers)
    support = preflight.choose_support(config.loss, student.vocab_size, servers.rollouts, servers.teachers)
    if config.loss.uses_rkl_advantage and not config.loss.has_policy_gradient:
        logger.info("loss.gamma = 0 with the single-step term: the policy-gradient term is zero (docs/losses.md)")

    room = preflight.max_model_len(config, servers.rollouts, servers.teachers) - config.longest_completion()
    prompts = files.prompts.fitting(room)
    num_steps = count_steps(config, len(prompts))
    stream = partial(RowStream, seed=config.seed, shuffle=config.data.shuffle)
    texts = stream(files.texts) if files.texts else None
    learner = Learner(config, student.to(accelerator.device), num_steps, texts)
    canaries = prompts[: config.weight_sync.canary_prompts]
    key = reveal(Secrets().rollout_key)
    run = uuid.uuid4().hex[:8]
    weights = WeightSync(config, accelerator.device, servers.rollout_client, servers.rollouts, canaries, key, run)
    stack.push_async_callback(weights.close)
    await weights.hold(_tell_of_holder)
    evaluator = None
    if files.held_out is not None:
        held_out = files.held_out.fitting(room)
        evaluator = Evaluator(
            config, held_out, tokenizer, servers.rollout_client, servers.teachers, end_token_ids, weights.versions
        )
    students = SavedStudents(config.output, student.model, tokenizer)
    stack.callback(students.release)
    students.reserve(num_steps)
    stack.callback(record.close)
    return Session(
        config=config,
        learner=learner,
        prompts=stream(prompts),
        num_steps=num_steps,
        support=support,
        rollout_client=servers.rollout_client,
        teachers=servers.teachers,
        buffer=StalenessBuffer(config.pipeline.max_staleness),
        weights=weights,
        evaluator=evaluator,
        quarantine=Quarantine(record.dir / "quarantine.jsonl", config.pipeline.max_quarantine_rate),
        record=record,
        students=students,
        progress=progress,
    )


def _tell_of_holder(url: str, seconds: float) -> None:
    logger.warning("%s is held by another run; if that is gone, it is free in %.0f s", url, seconds)


@dataclass(frozen=True)
class _Files:
    prompts: PromptRows
    held_out: PromptRows | None
    texts: list[list[int]]  # none without data.lm_path

    def teacher_names(self) -> set[str | None]:
        """What the rows call their teachers; None is in it when a row names none."""
        held_out = self.held_out.prompts if self.held_out is not None else []
        return {prompt.teacher for prompt in [*self.prompts.prompts, *held_out]}


def _read_files(config: RunConfig, tokenizer: PreTrainedTokenizerBase, end_token_ids: list[int]) -> _Files:
    data, limits = config.data, TextLimits.of(config)
    read = partial(read_prompts, config=data, tokenizer=tokenizer, teachers=config.teacher_client.named, limits=limits)
    prompts, held_out = read(data.path or "", option="data.path"), None
    if data.eval_path is not None:
        held_out = read(data.eval_path, option="data.eval_path")
        held_out = check_answers(held_out, end_token_ids, config.evaluation_max_new_tokens())
    return _Files(prompts, held_out, [] if data.lm_path is None else load_texts(data.lm_path, data, tokenizer, limits))


@dataclass(frozen=True)
class _Servers:
    rollout_client: RolloutClient
    rollouts: list[RolloutInfo]
    teachers: Teachers


async def _attach(config: RunConfig, files: _Files, stack: AsyncExitStack) -> _Servers:
    """Clients of all servers, closed with the stack, and what the servers say of themselves."""
    secrets = Secrets()
    rollout_client = RolloutClient(
        config.rollout_urls(),
        key=reveal(secrets.rollout_key),
        timeout_s=config.rollout_client.request_timeout_s,
        outage_s=config.rollout_client.outage_s,
    )
    urls = teacher_urls(config, files.teacher_names())
    teacher_clients = {name: _teacher_client(config, name, urls[name], secrets) for name in urls}
    for client in (rollout_client, *teacher_clients.values()):
        stack.push_async_callback(client.close)
    return _Servers(rollout_client, *await preflight.attach(config, rollout_client, teacher_clients))


def _teacher_client(config: RunConfig, name: str | None, urls: list[str], secrets: Secrets) -> TeacherClient:
    section = config.teacher_client
    options: dict[str, Any] = {"timeout_s": section.request_timeout_s, "outage_s": section.outage_s}
    options["key"] = reveal(secrets.teacher_key)
    if section.protocol == "vllm":
        # teacher.model is the one of rows that name no teacher; nothing tells the tokenizer of a named one.
        tokens = preflight.teacher_tokens(config.teacher) if name is None else None
        return VllmTeacherClient(urls, tokens=tokens, **options)
    return TeacherClient(urls, **options)


def count_steps(config: RunConfig, num_prompts: int) -> int:
    """pipeline.steps, or what pipeline.epochs comes to (at least one).

    Raises:
        ConfigError: the warm-up would be longer than the run.
    """
    if config.pipeline.steps is not None:
        return config.pipeline.steps
    assert config.pipeline.epochs is not None
    steps = max(1, round(config.pipeline.epochs * num_prompts / config.pipeline.prompts_per_step))
    if config.optimizer.warmup_steps > steps:
        raise ConfigError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} is above the {steps} steps that pipeline.epochs = "
            f"{config.pipeline.epochs} comes to with {num_prompts} prompts; warm up for fewer steps"
        )
    return steps
