"""bfloat16 bodies over float32 master weights: in training, in the canary and in the evaluation alike."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.config import RunConfig
from services.wire.rollout import RolloutSampling
from tests.models import save_model
from tests.unit.trainer.attached import teacher_of
from tests.unit.trainer.generating import Generator
from tests.unit.trainer.samples import BATCH, SAMPLES
from tests.unit.trainer.sgd_learners import learner_of
from trainer import student as student_module
from trainer.batch import pack
from trainer.learner import Learner
from trainer.parallel import place, whole
from trainer.ranks.group import Ranks
from trainer.student import Student, load_student
from trainer.weights.snapshot import GivenTokens

HALF = {"compute_dtype": "bfloat16"}


def student_of(folder: str, checkpointing: bool = False, **options: Any) -> Student:
    """Where a run on one rank would have it."""
    config = RunConfig(student={"model": folder, **options})
    return place(load_student(config.student, checkpointing=checkpointing), config, Ranks())


@pytest.fixture
def head_dtypes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The dtypes of what the head gives; its numbers are those of float32 products."""
    seen: list[torch.dtype] = []
    real = student_module.support_logprobs

    def recording(hidden: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> Any:
        found = real(hidden, weight, *arguments, **options)
        exact = real(hidden.float(), weight.float(), *arguments, **options)
        torch.testing.assert_close(found.token_logprobs, exact.token_logprobs, rtol=0, atol=1e-5)
        seen.append(found.token_logprobs.dtype)
        return found

    monkeypatch.setattr(student_module, "support_logprobs", recording)
    yield seen


def product_dtypes(model: Any) -> set[torch.dtype]:
    """Filled with the dtypes that linear layers of the body put out from now on."""
    seen: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    return seen


def logprobs(student: Student) -> Tensor:
    (batch,) = pack(BATCH, RunConfig().loss, 10_000)
    ids = batch.input_ids, batch.positions, batch.token_ids, batch.support_ids
    output: Any = student(*ids)
    return output.token_logprobs


def test_the_body_is_in_half_precision_and_the_head_is_not(
    tiny_model_folder: Any, head_dtypes: list[torch.dtype]
) -> None:
    """A float32 master under bfloat16 computes what a student with bfloat16 weights does, bit for bit."""
    folder = tiny_model_folder("qwen3")
    student = student_of(folder, **HALF)
    seen = product_dtypes(student)
    half = logprobs(student)
    assert seen == {torch.bfloat16} and head_dtypes == [torch.float32] and half.dtype == torch.float32
    exact, rounded = (logprobs(student_of(folder, **options)) for options in ({}, {"dtype": "bfloat16"}))
    assert 0 < (half - exact).abs().max().item() < 0.05 and torch.equal(half, rounded)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_near_those_of_float32_and_masters_stay(checkpointing: bool, tiny_model_folder: Any) -> None:
    gradients = []
    for options in ({}, HALF):
        student = student_of(tiny_model_folder("qwen3"), checkpointing, **options)
        assert student.model.is_gradient_checkpointing is checkpointing
        logprobs(student).sum().backward()
        found = [(p, p.grad) for p in student.parameters() if p.grad is not None]
        assert {t.dtype for pair in found for t in pair} == {torch.float32}
        gradients.append(torch.cat([whole(gradient).flatten() for _, gradient in found]))
    exact, half = gradients
    assert torch.nn.functional.cosine_similarity(exact, half, dim=0).item() > 0.999
    assert not torch.equal(exact, half)


def test_half_precision_masters_have_a_float32_head_as_well(
    tiny_model_folder: Any, head_dtypes: list[torch.dtype]
) -> None:
    logprobs(student_of(tiny_model_folder("llama"), dtype="bfloat16")).sum().backward()
    assert head_dtypes == [torch.float32]


def test_training_canary_and_evaluation_compute_alike(tiny_model_folder: Any) -> None:
    learner = learner_of(tiny_model_folder("qwen3"), student=HALF)
    seen = product_dtypes(learner.student)
    learner.step(BATCH)
    assert seen == {torch.bfloat16}
    seen.clear()

    learner.reverse_kl(BATCH)
    assert seen == {torch.bfloat16}
    seen.clear()
    rollout = SAMPLES[0].rollout
    learner.snapshot(0, torch.float32, GivenTokens([rollout.prompt.token_ids], [rollout.completion.token_ids.tolist()]))
    assert seen == {torch.bfloat16}


@torch.no_grad()
def largest_logit(model: Any, sequences: list[list[int]]) -> float:
    return max(model(torch.tensor([sequence])).logits.abs().max().item() for sequence in sequences)


@torch.no_grad()
def save_with_large_logits(folder: Path, architecture: str, prompts: list[list[int]]) -> str:
    """A random model with bfloat16 weights, whose largest logits over the prompts are 40."""
    save_model(folder, architecture, initializer_range=0.2)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.get_decoder().norm.weight.mul_(40.0 / largest_logit(model, prompts))
    model.bfloat16().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("student", [{"dtype": "bfloat16"}, HALF], ids=["half_masters", "half_compute"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])  # tied, untied
async def test_student_and_teacher_of_the_same_bfloat16_weights_agree_where_logits_are_large(
    architecture: str, student: dict[str, str], tmp_path: Path
) -> None:
    """At 40 the logits of a bfloat16 head would have steps of 0.25. The teacher's forward passes hold fewer sequences."""
    random = np.random.default_rng(0)
    prompts = random.integers(0, 256, (24, 8)).tolist()
    folder = save_with_large_logits(tmp_path, architecture, prompts)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    sampled = await Generator(model, []).generate(prompts, RolloutSampling(max_new_tokens=200))
    lengths = [8, 200, *random.integers(8, 201, len(prompts) - 2).tolist()]
    completions = [c.token_ids[:length].tolist() for c, length in zip(sampled, lengths, strict=True)]
    given = GivenTokens(prompts, completions)
    assert 30 < largest_logit(model, given.sequences) < 60
    learner = learner_of(folder, student=student)
    ours = np.concatenate(learner.logprobs(given))
    async with teacher_of(folder, dtype="bfloat16", device="cpu") as teacher:
        sequences = [(sequence, len(prompt)) for sequence, prompt in zip(given.sequences, prompts, strict=True)]
        theirs = (await teacher.client.score(sequences, top_k=1)).token_logprobs
    assert len(ours) == sum(lengths) and -2.0 < ours.mean() < -0.2  # one token does not have it all
    difference = np.abs(ours - theirs)
    print(f"{architecture}: mean |difference| {difference.mean():.1e}, largest {difference.max():.1e}")
    assert difference.mean() <= 1e-3


@pytest.mark.parametrize(
    ("student", "rollout", "on_gpu", "expected"),
    [
        ({}, "float32", True, "float32"),  # the canary asks for 1e-4
        ({}, "bfloat16", True, "bfloat16"),
        ({}, "float16", True, "bfloat16"),
        ({}, "bfloat16", False, "float32"),
        (HALF, "float32", False, "bfloat16"),
        ({"compute_dtype": "float32"}, "bfloat16", True, "float32"),
        ({"dtype": "bfloat16"}, "float32", False, "bfloat16"),
    ],
)
def test_auto_is_half_precision_on_a_gpu_beside_half_precision_rollouts(
    student: dict[str, Any], rollout: str, on_gpu: bool, expected: str
) -> None:
    config = RunConfig(student=student, rollout={"dtype": rollout})
    assert config.compute_dtype(on_gpu=on_gpu) == expected


def test_checkpointing_is_on_by_default_on_a_gpu_alone() -> None:
    for given, on_gpu, expected in (
        (None, True, True),
        (None, False, False),
        (False, True, False),
        (True, False, True),
    ):
        config = RunConfig(student={"gradient_checkpointing": given})
        assert config.uses_gradient_checkpointing(on_gpu=on_gpu) is expected


def test_small_updates_move_float32_masters_as_they_do_in_float32(tiny_model_folder: Any) -> None:
    """At a learning rate of 1e-6 most updates are below what a bfloat16 weight can take."""
    moved = {}
    for name, options in (("float32", {}), ("compute", HALF), ("masters", {"dtype": "bfloat16"})):
        config = RunConfig(
            student={"model": tiny_model_folder("qwen3"), **options},
            optimizer={"learning_rate": 1e-6, "schedule": "constant"},
        )
        student = place(load_student(config.student), config, Ranks())
        before = [whole(p.detach()).clone() for p in student.parameters()]
        learner = Learner(config, student, 10)
        for _ in range(3):
            learner.step(BATCH)
        pairs = list(zip(before, (whole(p.detach()) for p in student.parameters()), strict=True))
        moved[name] = sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    assert moved["compute"] == pytest.approx(moved["float32"], abs=0.01) and moved["float32"] > 0.5
    assert moved["masters"] < 0.2
