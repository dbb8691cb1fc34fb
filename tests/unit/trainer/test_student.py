"""Schedule, parameter groups, dropout."""

import pytest
import torch
from torch import nn

from services.config import OptimizerConfig, RunConfig
from tests.models import save_model
from trainer.optimizer import build_optimizer, build_schedule
from trainer.student import evaluating, load_student


def rates(num_steps: int, **options: object) -> list[float]:
    parameter = nn.Parameter(torch.zeros(1))
    config = OptimizerConfig(learning_rate=1.0, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([parameter], lr=config.learning_rate)
    schedule = build_schedule(optimizer, config, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_schedules_by_hand() -> None:
    assert rates(4, schedule="constant") == [1.0] * 4
    assert rates(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(4, schedule="cosine") == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert rates(5, schedule="linear", warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.5])
    assert rates(4, schedule="linear", min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_norms_are_not_decayed_and_everything_is_trained_once(architecture: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = load_student(RunConfig(student={"model": save_model(tmp_path, architecture)}).student)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 1 for p in plain["params"]) and all(p.ndim == 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("disable", [True, False])
def test_dropout_is_off_unless_asked_for(disable: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = save_model(tmp_path, "llama")
    options = {"model": folder, "disable_dropout": disable, "model_init_kwargs": {"attention_dropout": 0.5}}
    model = load_student(RunConfig(student=options).student).model
    ids = torch.arange(40).unsqueeze(0)
    torch.manual_seed(0)
    first, second = model(ids).logits, model(ids).logits
    assert model.training and torch.equal(first, second) == disable


@pytest.mark.parametrize("training", [True, False])
def test_what_is_measured_is_measured_without_dropout(training: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = save_model(tmp_path, "llama")
    options = {"model": folder, "disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.5}}
    student = load_student(RunConfig(student=options).student).train(training)
    ids, model = torch.arange(40).unsqueeze(0), student.model
    with pytest.raises(ZeroDivisionError), evaluating(student):
        assert torch.equal(model(ids).logits, model(ids).logits)
        raise ZeroDivisionError
    assert all(module.training == training for module in student.modules())
