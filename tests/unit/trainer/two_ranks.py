"""Rank 0 with a learner that leads and rank 1 that follows it, each in a process of its own, without servers."""

import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from services.config import RunConfig
from services.config.output_dir import find_checkpoint
from services.errors import DistillServeError
from services.process.signals import Interrupted, Interruption
from services.process.startup import free_port
from tests.ranks import leave
from trainer.following import follow
from trainer.leading import LeadingLearner, load_call
from trainer.learner import Learner
from trainer.open_session import _lead
from trainer.output.saving import SavedStudents
from trainer.own_optimizers import DEFAULT, OwnOptimizers
from trainer.parallel import load_reference, load_student_of
from trainer.ranks.group import Ranks, join_ranks
from trainer.student import Student
from trainer.tiny.pair import build_tokenizer
from trainer.weights.snapshot import GivenTokens

CANARY = GivenTokens([[5, 6, 7], [8]], [[9, 10], [11]])


class Leading:
    """What a scenario does on rank 0."""

    def __init__(self, config: RunConfig, ranks: Ranks, stack: ExitStack, optimizers: OwnOptimizers) -> None:
        checkpoint = find_checkpoint(config)
        self.interruption = Interruption()
        self.interruption.defer()
        followers = _lead(ranks, self.interruption, stack)
        assert followers is not None
        self.followers = followers
        followers.send("load", load_call(config, checkpoint))
        student, reference = load_student_of(config, ranks, checkpoint), load_reference(config, ranks)
        self.students = SavedStudents(config.output, student.model, build_tokenizer(), has_begun=True)
        given = (config, student, 10, ranks, followers, self.interruption, self.students.save)
        self.learner = LeadingLearner(*given, reference, optimizers)

    def push(self, version: int) -> list[torch.Tensor]:
        snapshot = self.learner.snapshot(version, torch.bfloat16, CANARY)
        return [tensor.clone() for _, tensor in snapshot.source]


Scenario = Callable[[Leading, Path], Any]
"""Runs on rank 0; returns what can be written as JSON."""


def break_step(number: int, error: Exception) -> None:
    """In this process, let a forward pass fail in the step of that number."""
    forward, steps = Student.forward, 0
    step = Learner.step

    def counting(self: Learner, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(self, batch)

    def failing(self: Student, *arguments: Any, **options: Any) -> Any:
        if steps == number:
            raise error
        return forward(self, *arguments, **options)

    Learner.step, Student.forward = counting, failing  # type: ignore[assignment, method-assign]


def _rank_0(config: RunConfig, scenario: Scenario, into: Path, optimizers: OwnOptimizers) -> Any:
    with ExitStack() as stack:
        return scenario(Leading(config, join_ranks(config), stack, optimizers), into)


def _rank_1(config: RunConfig, prepare: Callable[[], None], optimizers: OwnOptimizers) -> None:
    prepare()
    follow(join_ranks(config), optimizers)


def _process(
    rank: int,
    port: int,
    config: RunConfig,
    into: Path,
    scenario: Scenario,
    prepare: Callable[[], None],
    optimizers: OwnOptimizers,
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    said: dict[str, Any] = {}
    try:
        said["result"] = (
            _rank_0(config, scenario, into, optimizers) if rank == 0 else _rank_1(config, prepare, optimizers)
        )
    except (DistillServeError, Interrupted) as error:
        said["error"] = f"{type(error).__name__}: {error}"
    except BaseException:
        said["error"] = traceback.format_exc()
    (into / f"rank-{rank}.json").write_text(json.dumps(said))
    leave()


def nothing() -> None:
    """What rank 1 does before it follows."""


def run_pair(
    config: RunConfig,
    into: Path,
    scenario: Scenario,
    prepare: Callable[[], None] = nothing,
    optimizers: OwnOptimizers = DEFAULT,
) -> list[dict[str, Any]]:
    """What each rank came to: its "result" or its "error", or nothing where it was killed."""
    context, port = multiprocessing.get_context("spawn"), free_port("127.0.0.1", 0)
    processes = [
        context.Process(target=_process, args=(rank, port, config, into, scenario, prepare, optimizers))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100.0)
        if process.exitcode is None:
            process.kill()
            sys.exit(f"rank {processes.index(process)} hangs")
    files = [into / f"rank-{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
