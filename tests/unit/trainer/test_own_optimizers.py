"""A user's own optimizer and schedule: what may be given, what is refused, and that it is what trains."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from services.config import OptimizerConfig, RunConfig
from services.errors import ConfigError, UserCodeError
from tests.unit.trainer.samples import BATCH
from tests.unit.trainer.two_ranks import run_pair
from trainer.learner import Learner
from trainer.own_optimizers import OwnOptimizers
from trainer.student import load_student

SGD = torch.optim.SGD


def learner_with(folder: str, optimizer: Any = None, schedule: Any = None) -> Learner:
    config = RunConfig(student={"model": folder}, optimizer={"max_grad_norm": 1e6})
    return Learner(config, load_student(config.student), 10, optimizers=OwnOptimizers(optimizer, schedule))


@pytest.mark.parametrize(
    "given",
    [
        (SGD, {"lr": 0.5}),
        partial(SGD, lr=0.5),
        lambda model: SGD(model.parameters(), lr=0.5),
        lambda model: SGD([{"params": [p]} for p in model.parameters()], lr=0.5),
    ],
    ids=["pair", "partial", "function", "groups"],
)
def test_each_way_of_giving_an_optimizer_trains_with_it(given: Any, tiny_model_folder: Any) -> None:
    """Plain gradient descent moves each weight by the rate times its gradient."""
    learner = learner_with(tiny_model_folder("llama"), given, (torch.optim.lr_scheduler.ConstantLR, {"factor": 1.0}))
    before = [p.detach().clone() for p in learner.student.parameters()]
    gradients: list[torch.Tensor] = []
    learner.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in learner.student.parameters() if p.grad is not None)
    )
    metrics = learner.step(BATCH)
    after = [p.detach() for p in learner.student.parameters()]
    assert metrics["learning_rate"] == 0.5 and any(gradient.any() for gradient in gradients)
    for old, new, gradient in zip(before, after, gradients, strict=True):
        torch.testing.assert_close(new, old - 0.5 * gradient)


def test_a_class_alone_has_its_own_defaults(tiny_model_folder: Any) -> None:
    assert learner_with(tiny_model_folder("llama"), torch.optim.Adagrad).optimizer.defaults["lr"] == 1e-2


def test_the_schedule_of_the_config_goes_with_any_optimizer(tiny_model_folder: Any) -> None:
    learner = learner_with(tiny_model_folder("llama"), (SGD, {"lr": 0.5}))
    rates = [learner.step(BATCH)["learning_rate"] for _ in range(2)]
    assert rates == pytest.approx([0.5, 0.5 * 0.5 * (1 + torch.cos(torch.tensor(0.1) * torch.pi).item())])


def test_a_schedule_is_given_the_optimizer_and_the_number_of_steps(tiny_model_folder: Any) -> None:
    learner = learner_with(
        tiny_model_folder("llama"), None, lambda optimizer, steps: get_linear_schedule_with_warmup(optimizer, 0, steps)
    )
    rates = [learner.step(BATCH)["learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([1e-5, 0.9e-5, 0.8e-5])


def test_some_of_the_parameters_may_be_left_out(tiny_model_folder: Any) -> None:
    learner = learner_with(tiny_model_folder("llama"), lambda model: SGD(model.lm_head.parameters(), lr=0.5))
    before = {name: p.detach().clone() for name, p in learner.student.named_parameters()}
    learner.step(BATCH)
    changed = [name for name, p in learner.student.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["model.lm_head.weight"]


MODEL = torch.nn.Linear(2, 1)
READY = SGD(MODEL.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "options", "message"),
    [
        (
            READY,
            None,
            {},
            r"optimizers\[0\] is a ready SGD, which holds parameters of a model that is not the one trained",
        ),
        (None, torch.optim.lr_scheduler.ConstantLR(READY), {}, r"optimizers\[1\] is a ready ConstantLR"),
        ("adamw", None, {}, r"optimizers\[0\] is a str; give a class"),
        (3, None, {}, r"optimizers\[0\] is a int"),
        (None, torch.optim.lr_scheduler.ReduceLROnPlateau, {}, "ReduceLROnPlateau needs a measurement"),
        (SGD, None, {"learning_rate": 0.1}, "optimizer.learning_rate = 0.1 would be ignored"),
        (SGD, None, {"beta2": 0.9}, "optimizer.beta2 = 0.9 would be ignored"),
        (None, torch.optim.lr_scheduler.ConstantLR, {"warmup_steps": 3}, "optimizer.warmup_steps = 3 would be ignored"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    optimizer: Any, schedule: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        OwnOptimizers(optimizer, schedule).check(OptimizerConfig(**options))


@pytest.mark.parametrize(
    ("optimizer", "schedule", "message"),
    [
        (lambda model: SGD(MODEL.parameters(), lr=0.1), None, r"SGD of 2 parameters that the student does not train"),
        (lambda model: None, None, r"optimizers\[0\] made a NoneType; it must make a torch Optimizer"),
        (lambda model: 1 / 0, None, r"optimizers\[0\] = <lambda> failed: ZeroDivisionError: division by zero"),
        ((SGD, {"rate": 1}), None, r"optimizers\[0\] = SGD failed: TypeError"),
        (torch.optim.LBFGS, None, "LBFGS, whose step needs a closure"),
        (None, lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(READY), "ConstantLR of another optimizer"),
        (None, lambda optimizer: None, r"optimizers\[1\] = <lambda> failed: TypeError"),
    ],
)
def test_what_comes_of_a_factory_is_checked(
    optimizer: Any, schedule: Any, message: str, tiny_model_folder: Any
) -> None:
    with pytest.raises(UserCodeError, match=message):
        learner_with(tiny_model_folder("llama"), optimizer, schedule)


def two_steps(leading: Any, into: Path) -> list[float]:
    learner = leading.learner
    losses = [learner.step(BATCH)["loss"] for _ in range(2)]
    leading.students.save(learner.state())
    return losses


def test_two_ranks_with_an_own_optimizer_learn_as_one_does(tiny_model_folder: Any, tmp_path: Path) -> None:
    folder, own = tiny_model_folder("qwen3"), OwnOptimizers((SGD, {"lr": 0.5, "momentum": 0.9}))
    config = RunConfig(student={"model": folder}, output={"dir": str(tmp_path / "out")})
    leading, following = run_pair(config, tmp_path, two_steps, optimizers=own)
    assert "error" not in leading and "error" not in following, (leading, following)
    alone = Learner(config, load_student(config.student), 10, optimizers=own)
    losses = [alone.step(BATCH)["loss"] for _ in range(2)]
    assert leading["result"] == pytest.approx(losses, rel=1e-5) and losses[0] != pytest.approx(losses[1], rel=1e-3)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student", dtype=torch.float32)
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(parameter, alone.student.model.get_parameter(name), rtol=1e-5, atol=1e-6)
