"""Learners that are captured and go on, without a run around them."""

from pathlib import Path
from typing import Any

import torch

from services.config import RunConfig
from trainer.checkpoint.rank_file import RankFiles, write_rank_file
from trainer.learner import Captured, Learner
from trainer.own_optimizers import DEFAULT, OwnOptimizers
from trainer.parallel import load_and_place
from trainer.ranks.group import Ranks
from trainer.tiny.pair import build_tokenizer

NUM_STEPS = 6


def learner_of(config: RunConfig, optimizers: OwnOptimizers = DEFAULT, ranks: Ranks | None = None) -> Learner:
    ranks = ranks or Ranks()
    return Learner(config, load_and_place(config, ranks), NUM_STEPS, ranks, optimizers=optimizers)


def written(captured: Captured, model: Any, into: Path) -> Path:
    """The student and rank 0's file in a folder."""
    model.save_pretrained(into, state_dict=captured.student.tensors, save_original_format=False)
    build_tokenizer().save_pretrained(into)
    write_rank_file(into / "rank-0.safetensors", captured.state.tensors, captured.state.blocks)
    return into


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


def files_in(folder: Path) -> RankFiles:
    return RankFiles(sorted(folder.glob("rank-*.safetensors")))
