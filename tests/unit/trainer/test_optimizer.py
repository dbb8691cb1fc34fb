"""Schedule, parameter groups, and AdamW's numbers."""

import math

import pytest
import torch
from torch import nn

from services.config import OptimizerConfig, RunConfig
from tests.models import save_model
from trainer.optimizer import build_optimizer, build_schedule
from trainer.student import load_student


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


def adamw(
    weight: float, gradients: list[float], *, lr: float, beta1: float, beta2: float, eps: float, decay: float
) -> float:
    """A weight after updates by algorithm 2 of Loshchilov and Hutter (arXiv 1711.05101)."""
    m = v = 0.0
    for t, gradient in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        direction = (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + eps)
        weight -= lr * (direction + decay * weight)
    return weight


@pytest.mark.parametrize(
    "changed", [{}, {"beta1": 0.2}, {"beta2": 0.5}, {"eps": 3.0}, {"lr": 0.4}, {"decay": 0.5}], ids=str
)
def test_every_number_of_adamw_is_the_configurations(changed: dict[str, float]) -> None:
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.0} | changed
    gradients, module = [0.5, -2.0, 1.0], nn.Linear(1, 1)
    nn.init.constant_(module.weight, 1.5), nn.init.constant_(module.bias, 1.5)
    names = {"lr": "learning_rate", "decay": "weight_decay"}
    optimizer = build_optimizer(module, OptimizerConfig(**{names.get(k, k): v for k, v in numbers.items()}))  # type: ignore[arg-type]
    for gradient in gradients:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    assert module.weight.item() == pytest.approx(adamw(1.5, gradients, **numbers), rel=1e-6)
    assert module.bias.item() == pytest.approx(adamw(1.5, gradients, **numbers | {"decay": 0.0}), rel=1e-6)
