"""Learners that are captured and go on, without a run around them."""

from pathlib import Path
from typing import Any

import torch

from services.config import RunConfig
from trainer.checkpoint.folder import Checkpoint, begin, complete, open_checkpoint, write_part
from trainer.learner import Captured, Learner
from trainer.output.saving import SavedStudents
from trainer.own_optimizers import DEFAULT, OwnOptimizers
from trainer.parallel import load_student_of
from trainer.ranks.group import Ranks
from trainer.tiny.pair import build_tokenizer

NUM_STEPS = 10


def learner_of(
    config: RunConfig,
    optimizers: OwnOptimizers = DEFAULT,
    checkpoint: Checkpoint | None = None,
    num_steps: int = NUM_STEPS,
) -> Learner:
    """A new one, or one that goes on."""
    student = load_student_of(config, Ranks(), None if checkpoint is None else checkpoint.path)
    learner = Learner(config, student, num_steps, optimizers=optimizers)
    if checkpoint is not None:
        learner.resume(checkpoint)
    return learner


def written(captured: Captured, config: RunConfig, model: Any, path: Path, num_steps: int = NUM_STEPS) -> Checkpoint:
    """A complete checkpoint, read again."""
    beside = begin(path)
    SavedStudents(config.output, model, build_tokenizer()).write_into(beside, captured.student)
    write_part(beside, 0, captured.state.tensors, captured.state.blocks)
    state = {"step": captured.student.step, "num_steps": num_steps, "learner": captured.state.values}
    complete(path, 1, {**state, "config": config.model_dump(mode="json")})
    return open_checkpoint(path)


def all_state(learner: Learner) -> dict[str, Any]:
    """Everything that decides how a learner goes on."""
    names = {id(p): name for name, p in learner.student.named_parameters()}
    state: dict[str, Any] = {name: p.detach().clone() for name, p in learner.student.named_parameters()}
    for parameter, values in learner.optimizer.state.items():
        for key, value in values.items():
            copy = value.detach().clone() if isinstance(value, torch.Tensor) else value
            state[f"{names[id(parameter)]}/{key}"] = copy
    groups = [{k: v for k, v in group.items() if k != "params"} for group in learner.optimizer.param_groups]
    schedule = {k: v for k, v in learner.schedule.state_dict().items() if not callable(v)}
    return state | {"groups": groups, "schedule": schedule, "rng": torch.get_rng_state(), "step": learner.finished_step}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name
