"""Opening and closing a run: everything is checked before the first weight is changed."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from services.clients import RolloutClient, TeacherClient
from services.clients.plain_vllm import VllmTeacherClient
from services.clients.teacher_probe import PROBE_SEQUENCES
from services.config import RunConfig
from services.config.keys import Secrets, reveal
from services.config.output_dir import complete_checkpoints, find_checkpoint
from services.errors import ConfigError
from services.gpus.cards import check_driver
from services.gpus.cost import report_cost
from services.gpus.options import computed
from services.hub.run_folder import is_number
from services.models.causal_lm import eos_token_ids_on_disk, load_tokenizer
from services.process.event_loop import EventLoopThread
from services.process.folder_lock import lock_folder
from services.process.signals import Interrupted, Interruption
from services.wire.rollout import RolloutInfo
from trainer.attach import preflight
from trainer.attach.option_warnings import warn_of_options
from trainer.checkpoint.attempt import next_attempt
from trainer.checkpoint.facts import check_facts, facts_of_run
from trainer.checkpoint.folder import Checkpoint, check_state, open_checkpoint
from trainer.data.fingerprints import fingerprint_of_texts
from trainer.data.prompts import Prompt, PromptRows, first_prompts
from trainer.data.stream import RowStream
from trainer.data.text_limits import TextLimits
from trainer.data.texts import check_windows_fit, load_texts
from trainer.data.training_rows import TrainingRows, read_rows
from trainer.evaluation.evaluate import Evaluator
from trainer.evaluation.exact_match import check_answers
from trainer.leading import LeadingLearner, load_call
from trainer.learner import Learner
from trainer.output.checkpoints import Checkpoints
from trainer.output.progress import Progress
from trainer.output.report import RunRecord, reverse_kls_until
from trainer.output.saving import SavedStudents
from trainer.parallel import load_reference, load_student_of
from trainer.pipeline import Pipeline
from trainer.ranks.channel import Followers
from trainer.ranks.group import Ranks
from trainer.rewards.of_groups import GroupRewards, check_arguments
from trainer.rewards.pool import RewardPool
from trainer.rewards.process import refuse_in_worker
from trainer.rollout_function import OwnRollouts
from trainer.saved_state import SavedState
from trainer.scoring import Scoring
from trainer.session import Session
from trainer.student import Student
from trainer.teacher_scores import Quarantine, Support
from trainer.teachers import Teachers, teacher_urls
from trainer.user_objects import NOTHING, UserObjects
from trainer.watchdog import watching
from trainer.weights.weight_sync import WeightSync

logger = logging.getLogger(__name__)


@contextmanager
def open_session(
    config: RunConfig, interruption: Interruption, ranks: Ranks, objects: UserObjects = NOTHING
) -> Iterator[Session]:
    """Check everything, attach to the servers, load the student; close all of it at the end.

    Args:
        interruption: its signals are raised at once until the session is open, and deferred afterwards.
        ranks: this process is the first of them.
        objects: of the program that trains.

    Raises:
        DistillServeError: whatever a user can act on, before the first weight is changed.
    """
    refuse_in_worker()
    config.require("train")
    objects.check(config)
    objects.watch(interruption)
    with ExitStack() as stack:
        followers = _lead(ranks, interruption, stack)
        stack.enter_context(lock_folder(Path(config.output.dir), "output.dir", "`distillserve train`"))
        progress = stack.enter_context(Progress())
        own_rollouts_s = objects.rollout_timeout_s if objects.rollout_function is not None else 0.0
        event_loop = stack.enter_context(watching(config, interruption, own_rollouts_s))
        try:
            rewards = _start_rewards(config, event_loop, progress, stack)
            with progress.doing("reading the data and loading the student"):
                inputs = _read_inputs(config, ranks, followers, rewards, objects)
            with progress.doing("waiting for the servers"):
                servers = _attach(inputs, event_loop, stack)
            session = _assemble(inputs, servers, objects, rewards, interruption, event_loop, progress, stack)
            interruption.defer()
            yield session
        except Interrupted as error:
            if followers is not None and (lost := followers.lost) is not None:
                raise lost from error  # what has started this rank ends it as well
            raise
        finally:
            interruption.end()  # servers are given back in order, whatever comes


def _lead(ranks: Ranks, interruption: Interruption, stack: ExitStack) -> Followers | None:
    """The connections to the other ranks, which end with the stack; None where there are none."""
    if ranks.count == 1:
        return None
    followers = Followers(ranks, on_lost=interruption.fail, on_signal=lambda n: interruption.fail(Interrupted(n)))
    stack.callback(followers.end)
    return followers


def _start_rewards(
    config: RunConfig, event_loop: EventLoopThread, progress: Progress, stack: ExitStack
) -> RewardPool | None:
    """The processes of the reward functions, which end with the stack; before any model is loaded, for a name may be wrong."""
    if not config.reward.functions:
        return None
    pool = RewardPool(config.reward)
    stack.callback(event_loop.run, pool.close)
    with progress.doing("importing the reward functions"):
        event_loop.run(pool.start)
    return pool


@dataclass(frozen=True)
class _Inputs:
    """What a run starts from on this side.

    Attributes:
        config: with what was not given computed.
        given: the config without that.
        checkpoint: what the run goes on from; None: it begins.
        followers: None where this rank is alone.
        texts: none without data.lm_path.
    """

    given: RunConfig
    config: RunConfig
    checkpoint: Checkpoint | None
    ranks: Ranks
    followers: Followers | None
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: list[int]
    record: RunRecord
    prompts: TrainingRows
    held_out: PromptRows | None
    texts: list[list[int]]
    student: Student
    reference: Student | None

    def teacher_names(self) -> set[str | None]:
        """What the rows call their teachers; None is in it when a row names none."""
        return self.prompts.teachers | (set() if self.held_out is None else self.held_out.teachers)


def _read_inputs(
    config: RunConfig, ranks: Ranks, followers: Followers | None, pool: RewardPool | None, objects: UserObjects
) -> _Inputs:
    """Files first: a broken one must not wait for a model, or for the servers, to be reported."""
    Secrets().check()
    on_gpu = ranks.device.type == "cuda"
    check_driver(on_gpu)
    given, checkpoint = config, _find_checkpoint(config)
    config = computed(config, "trainer")
    accelerator = Accelerator(
        cpu=not on_gpu, log_with=list(config.output.trackers) or None, project_dir=config.output.dir
    )
    warn_of_options(config)
    name, trust = config.student.model or "", config.student.trust_remote_code
    tokenizer = load_tokenizer(name, trust_remote_code=trust, key="student.model")
    record = RunRecord(config, accelerator, tokenizer, None if checkpoint is None else next_attempt(checkpoint))
    end_token_ids = eos_token_ids_on_disk(name, tokenizer, trust_remote_code=trust)
    prompts, held_out, texts = _read_rows(config, tokenizer, end_token_ids)
    if pool is not None:
        may_come = objects.rollout_function is not None or prompts.columns is None
        check_arguments(config.reward.functions, pool.required, prompts.columns or (), may_come=may_come)
    for line in report_cost(config, ranks.count, ranks.local_count, on_gpu=on_gpu):
        logger.info(line)
    weights = None if checkpoint is None else checkpoint.path
    with nullcontext() if followers is None else followers.blaming():
        if followers is not None:
            followers.send("load", load_call(config, weights))
        student, reference = load_student_of(config, ranks, weights), load_reference(config, ranks)
    check_windows_fit(texts, student.model.config.get_text_config())
    return _Inputs(
        *(given, config, checkpoint, ranks, followers, accelerator, tokenizer, end_token_ids),
        *(record, prompts, held_out, texts, student, reference),
    )


def _find_checkpoint(config: RunConfig) -> Checkpoint | None:
    """What the run goes on from, compared with its checksums."""
    path = find_checkpoint(config)
    if path is None:
        return None
    checkpoint = open_checkpoint(path)
    check_state(SavedState, path)
    logger.warning("going on after step %d, from %s", checkpoint.step, path)
    return checkpoint


def _read_rows(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, end_token_ids: list[int]
) -> tuple[TrainingRows, PromptRows | None, list[list[int]]]:
    """Prompts to train on, prompts held out, and windows of text."""
    data, limits = config.data, TextLimits.of(config)
    prompts, held_out = read_rows(
        data, tokenizer, seed=config.seed, teachers=config.teacher_client.named, limits=limits
    )
    if held_out is not None:
        held_out = check_answers(held_out, end_token_ids, config.evaluation_max_new_tokens())
    return prompts, held_out, [] if data.lm_path is None else load_texts(data.lm_path, data, tokenizer, limits)


@dataclass(frozen=True)
class _Servers:
    rollout_client: RolloutClient
    rollouts: list[RolloutInfo]
    teachers: Teachers
    support: Support


def _attach(inputs: _Inputs, event_loop: EventLoopThread, stack: ExitStack) -> _Servers:
    """Clients of all servers, closed with the stack; what the servers say of themselves fits the student."""
    config, student, secrets = inputs.config, inputs.student, Secrets()
    rollout_client = RolloutClient(
        config.rollout_urls(),
        key=reveal(secrets.rollout_key),
        timeout_s=config.rollout_client.request_timeout_s,
        outage_s=config.rollout_client.outage_s,
    )
    urls = teacher_urls(config, inputs.teacher_names())
    teacher_clients = {name: _teacher_client(config, name, urls[name], secrets) for name in urls}
    for client in (rollout_client, *teacher_clients.values()):
        stack.callback(event_loop.run, client.close)
    rollouts, teachers = event_loop.run(preflight.attach, config, rollout_client, teacher_clients)
    preflight.check_rope_switch(student.rope_switch, rollout_client.urls, rollouts)
    event_loop.run(preflight.check_teachers, config, inputs.tokenizer, inputs.end_token_ids, teachers)
    support = preflight.choose_support(config.loss, student.vocab_size, rollouts, teachers)
    if config.loss.uses_rkl_advantage and not config.loss.has_policy_gradient:
        whose = "the teacher's part of the policy gradient" if config.learns_rewards else "the policy-gradient term"
        logger.info("loss.gamma = 0 with the single-step term: %s is zero (docs/losses.md)", whose)
    return _Servers(rollout_client, rollouts, teachers, support)


def _assemble(
    inputs: _Inputs,
    servers: _Servers,
    objects: UserObjects,
    pool: RewardPool | None,
    interruption: Interruption,
    event_loop: EventLoopThread,
    progress: Progress,
    stack: ExitStack,
) -> Session:
    """The parts of the run; the rollout servers are its own from here on."""
    config, record, ranks, checkpoint = inputs.config, inputs.record, inputs.ranks, inputs.checkpoint
    room = preflight.max_model_len(config, servers.rollouts, servers.teachers) - config.longest_completion()
    prompts = inputs.prompts.fitting(room, is_stream=objects.is_stream)
    num_steps = count_steps(config, len(prompts))
    order: dict[str, Any] = {"seed": config.seed, "shuffle": config.data.shuffle}
    stream, texts = prompts.stream(**order), RowStream(inputs.texts, **order) if inputs.texts else None
    rows = prompts.fingerprints()
    if inputs.texts:
        rows.append(["data.lm_path", fingerprint_of_texts(inputs.texts)])
    event_loop.run(preflight.keep_probes, config, servers.teachers, prompts.first(PROBE_SEQUENCES))
    facts = facts_of_run(
        *(inputs.given, record.attempt, num_steps, rows),
        *(inputs.tokenizer, servers.teachers.probe_answers()),
    )
    if checkpoint is not None:
        check_facts(facts, checkpoint)
        _move_on(checkpoint, stream, texts)
    students = SavedStudents(config.output, inputs.student.model, inputs.tokenizer, has_begun=checkpoint is not None)
    learner = _learner(inputs, num_steps, students, interruption, objects)
    if checkpoint is not None:
        learner.resume(checkpoint)
        record.attempt.announce(record.dir)
    weights = _hold(
        record.attempt.holder,
        config,
        ranks.device,
        servers,
        prompts.first(config.weight_sync.canary_prompts),
        event_loop,
        stack,
    )
    stack.callback(students.release)
    students.reserve(num_steps)
    checkpoints = _checkpoints(config, learner, students, record)
    stack.callback(record.close)
    pipeline = _pipeline(inputs, servers, objects, pool, weights, stream, texts, num_steps, learner.finished_step)
    stack.callback(event_loop.run, pipeline.close)
    return Session(
        config=config,
        num_steps=num_steps,
        interruption=interruption,
        event_loop=event_loop,
        learner=learner,
        pipeline=pipeline,
        weights=weights,
        evaluator=_evaluator(inputs, servers, weights, event_loop, room),
        record=record,
        students=students,
        checkpoints=checkpoints,
        progress=progress,
        facts=facts,
        resumed=None if checkpoint is None else checkpoint.state,
        callbacks=objects.callbacks,
        begun=objects.begun,
    )


def _learner(
    inputs: _Inputs, num_steps: int, students: SavedStudents, interruption: Interruption, objects: UserObjects
) -> Learner:
    """That of this rank, which the other ranks follow where there are any."""
    config, student, ranks, reference = inputs.config, inputs.student, inputs.ranks, inputs.reference
    if inputs.followers is None:
        return Learner(config, student, num_steps, ranks, interruption.check, reference, objects.optimizers)
    return LeadingLearner(
        *(config, student, num_steps, ranks, inputs.followers),
        *(interruption, students.save, reference, objects.optimizers),
    )


def _evaluator(
    inputs: _Inputs, servers: _Servers, weights: WeightSync, event_loop: EventLoopThread, room: int
) -> Evaluator | None:
    """None without held-out prompts.

    Args:
        room: tokens of the longest prompt that can be completed.
    """
    if inputs.held_out is None:
        return None
    return Evaluator(
        inputs.config,
        event_loop,
        first_prompts(inputs.held_out.fitting(room), inputs.config.evaluation.num_prompts),
        inputs.tokenizer,
        servers.rollout_client,
        servers.teachers,
        inputs.end_token_ids,
        weights.versions,
    )


def _pipeline(
    inputs: _Inputs,
    servers: _Servers,
    objects: UserObjects,
    pool: RewardPool | None,
    weights: WeightSync,
    prompts: RowStream[Prompt],
    texts: RowStream[list[int]] | None,
    num_steps: int,
    finished_step: int,
) -> Pipeline:
    config, record = inputs.config, inputs.record
    rewards = None
    if pool is not None:
        rewards = GroupRewards(config, pool, inputs.tokenizer, num_steps, inputs.prompts.columns or ())
    scoring = Scoring(
        *(servers.teachers, servers.support, config.loss.kd_temperature, rewards),
        probe_every_steps=config.teacher_client.probe_every_steps,
    )
    quarantine = Quarantine(record.dir / "quarantine.jsonl", config.pipeline.max_quarantine_rate)
    return Pipeline(
        *(config, prompts, num_steps, servers.rollout_client, weights, scoring, quarantine, record.token),
        texts=texts,
        own_rollouts=_own_rollouts(objects, inputs, servers, weights),
        finished_step=finished_step,
    )


def _checkpoints(config: RunConfig, learner: Learner, students: SavedStudents, record: RunRecord) -> Checkpoints:
    last, there = learner.finished_step, complete_checkpoints(record.dir)
    measured = reverse_kls_until(record.dir, last) if last else {}
    return Checkpoints(
        config.output,
        learner,
        students,
        record.sync,
        finished_step=last,
        reverse_kls={step: kl for step, kl in measured.items() if step in there and is_number(kl)},
    )


def _move_on(checkpoint: Checkpoint, prompts: RowStream[Prompt], texts: RowStream[list[int]] | None) -> None:
    """Let the data go on behind what the steps up to a checkpoint have used."""
    positions = checkpoint.state["positions"]
    prompts.position = positions["prompts"]
    if texts is not None:
        texts.position = positions["texts"]


def _own_rollouts(objects: UserObjects, inputs: _Inputs, servers: _Servers, weights: WeightSync) -> OwnRollouts | None:
    """The user's rollout function, where there is one."""
    if objects.rollout_function is None:
        return None
    return OwnRollouts(
        function=objects.rollout_function,
        timeout_s=objects.rollout_timeout_s,
        client=servers.rollout_client,
        versions=weights.versions,
        tokenizer=inputs.tokenizer,
        vocab_size=inputs.student.vocab_size,
        max_model_len=preflight.max_model_len(inputs.config, servers.rollouts, servers.teachers),
        end_token_ids=inputs.end_token_ids,
    )


def _hold(
    holder: str,
    config: RunConfig,
    device: torch.device,
    servers: _Servers,
    canary_prompts: list[Prompt],
    event_loop: EventLoopThread,
    stack: ExitStack,
) -> WeightSync:
    """Make the rollout servers this run's own until the stack is closed."""
    key = reveal(Secrets().rollout_key)
    weights = WeightSync(config, device, servers.rollout_client, servers.rollouts, canary_prompts, key, holder)
    stack.callback(event_loop.run, weights.close)
    event_loop.run(weights.hold, _tell_of_holder)
    return weights


def _tell_of_holder(url: str, seconds: float) -> None:
    logger.warning("%s is held by another run; if that is gone, it is free in %.0f s", url, seconds)


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
