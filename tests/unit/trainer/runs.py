"""A whole run in this process: the trainer's own parts, a teacher on a real port, and rollout servers that are not vLLM's."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from services.clients import TeacherClient
from services.config import RunConfig
from services.process.event_loop import EventLoopThread
from services.process.signals import Interruption
from services.wire.policy_label import PolicyLabel
from services.wire.rollout import RolloutCompletion, RolloutSampling, VersionSpan
from tests.scripted_teacher import ScriptedTeacher
from trainer.checkpoint.attempt import next_attempt
from trainer.checkpoint.facts import check_facts, facts_of_run
from trainer.data.prompts import Prompt
from trainer.data.stream import RowStream
from trainer.evaluation.evaluate import Evaluator
from trainer.learner import Learner
from trainer.open_session import _checkpoints, _find_checkpoint, _move_on, _start_rewards
from trainer.output.progress import Progress
from trainer.output.report import RunRecord
from trainer.output.saving import SavedStudents
from trainer.parallel import load_student_of
from trainer.pipeline import Pipeline
from trainer.ranks.group import Ranks
from trainer.rewards.of_groups import GroupRewards
from trainer.rollout_function import OwnRollouts
from trainer.scoring import Scoring
from trainer.session import Session
from trainer.teacher_scores import Quarantine, Support
from trainer.teachers import Teacher, Teachers
from trainer.tiny.pair import build_tokenizer
from trainer.user_objects import NOTHING, UserObjects
from trainer.weights.policy_versions import PolicyVersions
from trainer.weights.snapshot import GivenTokens, WeightSnapshot

VOCAB = 261
END = 256
PROMPTS = [Prompt(row, list(f"{row}+{row}=".encode()), f"{row}+{row}=") for row in range(1, 9)]
Step = Callable[[], None]


class Rollouts:
    """Completes with digits that depend on the version, the last push's, and the prompt's place."""

    def __init__(self) -> None:
        self.version = "default"
        self.num_calls = 0
        self.on_call: Callable[[int], None] = lambda call: None
        self.group = SimpleNamespace(weights_wanted=asyncio.Event())

    async def generate(
        self,
        prompts: list[list[int]],
        sampling: RolloutSampling,
        samples_per_prompt: int = 1,
        student_top_k: int = 0,
        on_completion: Callable[[RolloutCompletion], None] = lambda completion: None,
        *,
        waits_for_weights: bool = False,
    ) -> list[RolloutCompletion]:
        self.num_calls += 1
        self.on_call(self.num_calls)
        completions = [self._complete(index, sampling.max_new_tokens) for index in range(len(prompts))]
        for completion in completions:
            on_completion(completion)
        return completions

    def _complete(self, index: int, most: int) -> RolloutCompletion:
        random = np.random.default_rng([PolicyLabel.parse(self.version).version, index])
        ids = random.integers(48, 58, random.integers(1, most + 1)).astype(np.int32)
        stops = len(ids) < most
        ids[-1] = END if stops else ids[-1]
        spans = [VersionSpan(self.version, 0, len(ids))]
        logprobs = np.full(len(ids), -4.0, np.float32)
        return RolloutCompletion(index, 0, ids, logprobs, "stop" if stops else "length", spans)


class Pushes:
    """Weight pushes that only count."""

    rollout_dtype = torch.float32

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts, self.versions = rollouts, PolicyVersions("run")
        self.on_push: Callable[[int], None] = lambda version: None

    async def canary(self) -> GivenTokens:
        return GivenTokens([[48]], [[49]])

    async def publish(self, snapshot: WeightSnapshot) -> dict[str, float]:
        self.on_push(snapshot.version)
        label = self.versions.next_label(snapshot.version)
        self.versions.set_live(label)
        self._rollouts.version = str(label)
        return {"push_s": 0.0}


def build_session(
    config: RunConfig,
    interruption: Interruption,
    teacher: ScriptedTeacher,
    stack: ExitStack,
    objects: UserObjects = NOTHING,
) -> Session:
    """What trainer.open_session opens, over `teacher` and the stand-ins above."""
    tokenizer, checkpoint = build_tokenizer(), _find_checkpoint(config)
    student = load_student_of(config, Ranks(), checkpoint and checkpoint.path)
    accelerator = Accelerator(cpu=True, log_with=list(config.output.trackers) or None, project_dir=config.output.dir)
    event_loop = stack.enter_context(EventLoopThread(interruption))
    client = TeacherClient([teacher.url], outage_s=config.teacher_client.outage_s)
    stack.callback(event_loop.run, client.close)
    rollouts: Any = Rollouts()
    weights: Any = Pushes(rollouts)
    teachers = Teachers([Teacher(None, client, teacher.info)])
    record = RunRecord(config, accelerator, tokenizer, checkpoint and next_attempt(checkpoint))
    num_steps = config.pipeline.steps or 1
    facts = facts_of_run(config, record.attempt, num_steps, [["data.path", "PROMPTS"]], tokenizer, {})
    if checkpoint is not None:
        check_facts(facts, checkpoint)
    students = SavedStudents(config.output, student.model, tokenizer, has_begun=checkpoint is not None)
    learner = Learner(config, student, num_steps, check=interruption.check, optimizers=objects.optimizers)
    if checkpoint is not None:
        learner.resume(checkpoint)
        record.attempt.announce(record.dir)
    stack.callback(students.release)
    students.reserve(num_steps)
    stack.callback(record.close)
    quarantine = Quarantine(record.dir / "quarantine.jsonl", config.pipeline.max_quarantine_rate)
    pool = _start_rewards(config, event_loop, Progress(), stack)
    rewards = None if pool is None else GroupRewards(config, pool, tokenizer, num_steps, ())
    scoring = Scoring(teachers, Support("teacher_topk", 8, VOCAB), 1.0, rewards)
    stream = RowStream(PROMPTS, seed=0, shuffle=False)
    if checkpoint is not None:
        _move_on(checkpoint, stream, None)
    own = None
    if objects.rollout_function is not None:
        function, versions = objects.rollout_function, weights.versions
        own = OwnRollouts(function, objects.rollout_timeout_s, rollouts, versions, tokenizer, VOCAB, 64, [END])
    given = (config, stream, num_steps, rollouts, weights, scoring, quarantine, record.token)
    pipeline = Pipeline(*given, own_rollouts=own, finished_step=learner.finished_step)
    stack.callback(event_loop.run, pipeline.close)
    return Session(
        config=config,
        num_steps=num_steps,
        interruption=interruption,
        event_loop=event_loop,
        learner=learner,
        pipeline=pipeline,
        weights=weights,
        evaluator=Evaluator(config, event_loop, PROMPTS, tokenizer, rollouts, teachers, [END], weights.versions),
        record=record,
        students=students,
        checkpoints=_checkpoints(config, learner, students, record),
        progress=Progress(),
        facts=facts,
        resumed=checkpoint and checkpoint.state,
        callbacks=objects.callbacks,
        begun=objects.begun,
    )


def rollouts_of(session: Session) -> Rollouts:
    """The stand-in that a session of `opener` asks."""
    client: Any = session.pipeline._client
    return client


def pushes_of(session: Session) -> Pushes:
    """The stand-in that a session of `opener` pushes with."""
    weights: Any = session.weights
    return weights


def opener(teacher: ScriptedTeacher, prepare: Callable[[Session], None]) -> Any:
    """Takes the place of trainer.train.open_session.

    Args:
        prepare: called with the open session.
    """

    @contextmanager
    def open_session(
        config: RunConfig, interruption: Interruption, ranks: Ranks, objects: UserObjects = NOTHING
    ) -> Iterator[Session]:
        with ExitStack() as stack:
            session = build_session(config, interruption, teacher, stack, objects)
            prepare(session)
            interruption.defer()
            objects.watch(interruption)
            try:
                yield session
            finally:
                interruption.end()

    return open_session


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run_config(folder: str, into: Path, **sections: dict[str, Any]) -> RunConfig:
    """Three steps of four prompts."""
    base: dict[str, dict[str, Any]] = {
        "student": {"model": folder},
        "teacher_client": {"outage_s": 0.2},
        "sampling": {"max_new_tokens": 4},
        "optimizer": {"learning_rate": 1e-2, "max_skipped_updates": 0},
        "pipeline": {"steps": 3, "prompts_per_step": 4, "max_quarantine_rate": 0.5},
        "output": {"dir": str(into), "trackers": [], "save_every_steps": 0},
    }
    return RunConfig(**{name: base.get(name, {}) | sections.get(name, {}) for name in base.keys() | sections.keys()})
