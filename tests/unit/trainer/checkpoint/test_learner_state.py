"""A learner that is captured, written, read and goes on is, bit for bit, the one that never ended."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR

from services.config import RunConfig
from services.errors import ConfigError, StartupError
from tests.unit.trainer.checkpoint.learners import all_state, assert_same, learner_of, written
from tests.unit.trainer.samples import BATCH, batch_of, sample
from trainer.learner import Learner
from trainer.own_optimizers import DEFAULT, OwnOptimizers

BATCHES = [BATCH, batch_of([sample(20, 3, 4), sample(21, 2, 6)], [[5, 6, 7]]), batch_of([]), BATCH]


def config_of(folder: str, **sections: dict[str, Any]) -> RunConfig:
    base: dict[str, dict[str, Any]] = {
        "student": {"model": folder},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1},
    }
    return RunConfig(**{name: base.get(name, {}) | sections.get(name, {}) for name in base.keys() | sections.keys()})


def dropout(folder: str) -> dict[str, dict[str, Any]]:
    kwargs = {"attention_dropout": 0.3}
    return {"student": {"model": folder, "disable_dropout": False, "model_init_kwargs": kwargs}}


def going_on(config: RunConfig, optimizers: OwnOptimizers, into: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What two steps, and two more, come to: in one learner, and in two with a checkpoint between them."""
    learner = learner_of(config, optimizers)
    for batch in BATCHES[:2]:
        learner.step(batch)
    captured = learner.capture(into)
    for batch in BATCHES[2:]:
        learner.step(batch)  # before it is written: what was captured is a copy
    whole = all_state(learner)
    other = learner_of(config, optimizers, written(captured, config, learner.student.model, into))
    for batch in BATCHES[2:]:
        other.step(batch)
    return whole, all_state(other)


class Own(torch.optim.Optimizer):
    """With state of every kind that is kept: like the parameter, of another dtype and shape, numbers."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"count": 0, "sum": torch.zeros_like(p, dtype=torch.float64), "last": torch.zeros(3)}
                    state["kind"] = "own"
                if p.grad is None:
                    continue
                state["count"] += 1
                state["sum"] += p.grad
                state["last"][state["count"] % 3] = p.grad.norm()
                p -= group["lr"] * (state["sum"] / (1 + state["last"].sum() + state["count"])).to(p.dtype)


@pytest.mark.parametrize(
    "optimizers",
    [
        DEFAULT,
        OwnOptimizers(Own),
        OwnOptimizers((torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})),
        OwnOptimizers((torch.optim.Adafactor, {"lr": 0.01})),
        OwnOptimizers(None, (torch.optim.lr_scheduler.MultiStepLR, {"milestones": [1, 3], "gamma": 0.5})),
        OwnOptimizers(None, (torch.optim.lr_scheduler.OneCycleLR, {"max_lr": 0.01, "total_steps": 9})),
    ],
    ids=["AdamW", "own", "SGD", "Adafactor", "MultiStepLR", "OneCycleLR"],
)
def test_steps_and_a_checkpoint_and_steps_are_the_steps(
    optimizers: OwnOptimizers, tiny_model_folder: Any, tmp_path: Path
) -> None:
    sections = {} if optimizers.optimizer is None and optimizers.schedule is None else {"optimizer": {}}
    config = config_of(tiny_model_folder("qwen3"), **dropout(tiny_model_folder("qwen3")))
    if sections:
        config = RunConfig(**dropout(tiny_model_folder("qwen3")))
    assert_same(*going_on(config, optimizers, tmp_path / "step-2"))


@pytest.mark.parametrize(
    "sections",
    [
        {"pipeline": {"updates_per_batch": 2}},
        {"student": {"compute_dtype": "bfloat16"}},
        {"student": {"dtype": "bfloat16"}},
        {"optimizer": {"schedule": "constant"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_of_every_kind_of_learner(
    architecture: str, sections: dict[str, Any], tiny_model_folder: Any, tmp_path: Path
) -> None:
    folder = tiny_model_folder(architecture)
    given = {**sections, "student": {"model": folder, **sections.get("student", {})}}
    assert_same(*going_on(config_of(folder, **given), DEFAULT, tmp_path / "step-2"))


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"r": 4, "init_lora_weights": "orthogonal", "use_dora": True, "modules_to_save": ["lm_head"]}},
        {
            "lora": {"r": 2, "lora_dropout": 0.3, "bias": "all"},
            "student": {"dtype": "bfloat16", "disable_dropout": False},
        },
    ],
    ids=str,
)
def test_of_a_learner_with_an_adapter(sections: dict[str, Any], tiny_model_folder: Any, tmp_path: Path) -> None:
    given = {**sections, "student": {"model": tiny_model_folder("llama"), **sections.get("student", {})}}
    assert_same(*going_on(config_of(tiny_model_folder("llama"), **given), DEFAULT, tmp_path / "step-2"))


def cosine(optimizer: torch.optim.Optimizer, num_steps: int) -> LRScheduler:
    return CosineAnnealingLR(optimizer, T_max=num_steps)


def one_cycle(optimizer: torch.optim.Optimizer, num_steps: int) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=1e-2, total_steps=num_steps + 1)


def two_parts(optimizer: torch.optim.Optimizer, num_steps: int) -> LRScheduler:
    parts = [LinearLR(optimizer, 0.1, total_iters=2), LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)]
    return SequentialLR(optimizer, parts, milestones=[2])


def of_no_length(optimizer: torch.optim.Optimizer, num_steps: int) -> LRScheduler:
    return MultiStepLR(optimizer, [1, 3, 5], gamma=0.5)


@pytest.mark.parametrize("schedule", [None, cosine, one_cycle, two_parts, of_no_length])
def test_a_run_that_is_made_longer_has_the_rates_of_the_longer_one(
    schedule: Any, tiny_model_folder: Any, tmp_path: Path
) -> None:
    config, optimizers = config_of(tiny_model_folder("llama")), OwnOptimizers(None, schedule)
    if schedule is not None:
        config = RunConfig(student={"model": tiny_model_folder("llama")})

    def rates(learner: Learner, steps: int) -> list[list[float]]:
        groups, found = learner.optimizer.param_groups, []
        for _ in range(steps):
            learner.step(BATCH)
            found.append([number for group in groups for number in (group["lr"], *group["betas"])])
        return found

    short = learner_of(config, optimizers, num_steps=4)
    rates(short, 3)
    checkpoint = written(short.capture(tmp_path), config, short.student.model, tmp_path / "step-3", num_steps=4)
    expected = rates(learner_of(config, optimizers, num_steps=8), 8)[3:]
    np.testing.assert_allclose(rates(learner_of(config, optimizers, checkpoint, num_steps=8), 5), expected, rtol=1e-12)
    assert (rates(short, 1)[0] == expected[0]) == (schedule is of_no_length)


class WithNumbers(Own):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        next(iter(self.state.values()))[0] = torch.zeros(2)


class Holding(Own):
    held: Any = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        next(iter(self.state.values()))["held"] = self.held


@pytest.mark.parametrize(
    ("held", "named"), [({1, 2}, "a set"), ([torch.zeros(2)], "a Tensor"), (len, "a builtin")], ids=str
)
def test_a_state_that_is_no_tensor_and_no_plain_value_is_refused_by_name(
    held: Any, named: str, tiny_model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Holding, "held", held)
    learner = learner_of(RunConfig(student={"model": tiny_model_folder("llama")}), OwnOptimizers(Holding))
    learner.check_capture()
    learner.step(BATCH)
    for call in (learner.check_capture, partial(learner.capture, tmp_path)):
        with pytest.raises(
            ConfigError, match=rf"Holding cannot be resumed: its state\[.*\]\['held'\] is or holds {named}.*"
        ):
            call()


def test_a_state_under_a_number_is_refused_by_name(tiny_model_folder: Any) -> None:
    learner = learner_of(RunConfig(student={"model": tiny_model_folder("llama")}), OwnOptimizers(WithNumbers))
    learner.step(BATCH)
    with pytest.raises(
        ConfigError, match=r"WithNumbers cannot be resumed: its state\['.*'\] has the key 0, and a checkpoint"
    ):
        learner.check_capture()


def test_the_state_of_another_optimizer_or_student_is_refused(tiny_model_folder: Any, tmp_path: Path) -> None:
    config = config_of(tiny_model_folder("llama"))
    learner = learner_of(config)
    learner.step(BATCH)
    captured = learner.capture(tmp_path)
    checkpoint = written(captured, config, learner.student.model, tmp_path / "step-1")
    other = learner_of(RunConfig(student={"model": tiny_model_folder("llama")}), OwnOptimizers(Own))
    with pytest.raises(StartupError, match="of the optimizer AdamW, this run has Own"):
        other.resume(checkpoint)
    with pytest.raises(StartupError, match=r"do not train the same parameters: model\."):
        learner_of(config_of(tiny_model_folder("qwen3"))).resume(checkpoint)
    values = json.loads(json.dumps(captured.state.values))
    values["state"]["model.lm_head.weight"]["absent"] = {"like": "parameter", "device": "parameter"}
    with pytest.raises(StartupError, match=r"holds no optimizer/model\.lm_head\.weight/absent"):
        learner_of(config).resume(replace(checkpoint, state={**checkpoint.state, "learner": values}))
