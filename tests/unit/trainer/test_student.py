"""The student in training and in measuring: dropout, recomputed activations."""

from collections.abc import Callable

import pytest
import torch

from services.config import RunConfig
from tests.models import save_model
from trainer.parallel import measuring
from trainer.student import load_student


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
    with pytest.raises(ZeroDivisionError), measuring(student):
        assert torch.equal(model(ids).logits, model(ids).logits) and not model(ids).logits.requires_grad
        raise ZeroDivisionError
    assert all(module.training == training for module in student.modules())


@pytest.mark.parametrize(
    ("configured", "asked", "recomputes"),
    [(None, None, False), (True, None, True), (True, False, False), (False, True, True), (None, True, True)],
)
def test_layers_run_again_in_the_backward_pass_where_it_is_asked_for(
    configured: bool | None, asked: bool | None, recomputes: bool, tiny_model_folder: Callable[[str], str]
) -> None:
    config = RunConfig(student={"model": tiny_model_folder("llama"), "gradient_checkpointing": configured}).student
    student, num_runs = load_student(config, checkpointing=asked), 0

    def count(*_: object) -> None:
        nonlocal num_runs
        num_runs += 1

    for layer in student.model.model.layers:
        layer.mlp.register_forward_pre_hook(count)
    ids = torch.tensor([[1, 2, 3]])
    student(ids, torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[5], [6]])).token_logprobs.sum().backward()
    assert num_runs == 2 * (1 + recomputes)
