"""One rank on a GPU: float32 masters with bfloat16 products, and what of the student goes out.

Run on a machine with an NVIDIA GPU: `make test ARGS="-m gpu"`. The student has the shape of Qwen3-0.6B and random weights.
"""

import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.gpu.students import DEVICE, batch_of, learner_of
from trainer.learner import Learner
from trainer.parallel import local
from trainer.weights.snapshot import GivenTokens

pytestmark = pytest.mark.gpu

BATCH = batch_of(512, 448, 320, 200)
GIVEN = GivenTokens([[1, 2, 3]] * 4, [batch_of(96, seed=seed).token_ids.tolist() for seed in range(4)])
FLOAT32 = {"rollout": {"dtype": "float32"}}
# Updates are about as large as gradients: a sum that another order of additions rounds otherwise moves no weight far.
SMOOTH = {"optimizer": {"learning_rate": 1e-2, "eps": 1e-3}}


def masters(learner: Learner) -> list[Tensor]:
    return [local(p.detach()).cpu().clone() for p in learner.student.parameters()]


def changed_share(before: list[Tensor], after: list[Tensor]) -> float:
    changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    return changed / sum(map(Tensor.numel, before))


# ------------------------------------------------------------------------------------------------ precision


def test_small_updates_reach_float32_masters_under_bfloat16_products(model: str) -> None:
    """bfloat16 weights, the control, keep what they were almost everywhere."""
    options = {"optimizer": {"learning_rate": 1e-6}}
    students: dict[str, dict[str, Any]] = {"exact": FLOAT32, "mixed": {}, "half": {"student": {"dtype": "bfloat16"}}}
    shares, metrics = {}, {}
    for name, sections in students.items():
        learner = learner_of(model, **options, **sections)
        before = masters(learner)
        metrics[name] = learner.step(BATCH)
        shares[name] = changed_share(before, masters(learner))
        assert {tensor.dtype for tensor in before} == {torch.bfloat16 if name == "half" else torch.float32}
    assert shares["exact"] > 0.9 and shares["mixed"] == pytest.approx(shares["exact"], rel=0.01)
    assert shares["half"] < 0.1
    for name in ("loss", "grad_norm", "single_step_kl"):
        assert metrics["mixed"][name] == pytest.approx(metrics["exact"][name], rel=0.03), name


def test_packed_rows_train_as_padded_ones_do(shallow: str) -> None:
    """Torch's kernel for packed rows against its usual one, at lengths whose rows are half padding."""
    batch, metrics, changes = batch_of(1024, 700, 333, 256, 130, 65), {}, {}
    for name in ("sdpa", "varlen"):
        learner = learner_of(shallow, student={"attn_implementation": name}, **SMOOTH)
        before = masters(learner)
        metrics[name] = learner.step(batch)
        changes[name] = torch.cat([(b - a).flatten() for a, b in zip(before, masters(learner), strict=True)])
    for name in ("loss", "grad_norm", "single_step_kl", "student_entropy"):
        assert metrics["varlen"][name] == pytest.approx(metrics["sdpa"][name], rel=0.01), name
    assert torch.nn.functional.cosine_similarity(*changes.values(), dim=0).item() > 0.99


def test_the_host_keeps_what_an_offloaded_student_is_made_of(model: str) -> None:
    on_gpu = learner_of(model, **SMOOTH)
    start = masters(on_gpu)
    on_gpu.step(BATCH)
    expected = masters(on_gpu)
    num_bytes = 4 * sum(map(Tensor.numel, expected))
    del on_gpu
    gc.collect()
    before = torch.cuda.memory_allocated()
    offloaded = learner_of(model, trainer={"cpu_offload": True}, **SMOOTH)
    offloaded.step(BATCH)
    assert torch.cuda.memory_allocated() - before < 0.02 * num_bytes
    state = [value for of_one in offloaded.optimizer.state.values() for value in of_one.values()]
    held = [*offloaded.student.parameters(), *(value for value in state if isinstance(value, Tensor))]
    assert {tensor.device.type for tensor in held} == {"cpu"}
    found = masters(offloaded)
    assert max(float((a - b).abs().max()) for a, b in zip(start, expected, strict=True)) > 1e-3
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_no_byte(value: float, shallow: str) -> None:
    learner = learner_of(shallow)
    assert learner.step(BATCH)["num_skipped_updates"] == 0.0  # the optimizer has its state
    before = [masters(learner), state_of(learner)]
    logprobs = BATCH.teacher_token_logprobs.copy()
    logprobs[3] = value
    assert learner.step(replace(BATCH, teacher_token_logprobs=logprobs))["num_skipped_updates"] == 1.0
    for was, is_now in zip(before, [masters(learner), state_of(learner)], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(was, is_now, strict=True))
    assert learner.step(BATCH)["num_skipped_updates"] == 0.0
    assert changed_share(before[0], masters(learner)) > 0.9


def state_of(learner: Learner) -> list[Tensor]:
    """The moments of AdamW."""
    state = [value for of_one in learner.optimizer.state.values() for value in of_one.values()]
    return [local(value).cpu().clone() for value in state if isinstance(value, Tensor)]


# ------------------------------------------------------------------------------------------------ what goes out


def test_the_snapshot_is_the_masters_in_bfloat16_and_says_what_a_bfloat16_model_says(
    model: str, tmp_path: Path
) -> None:
    learner = learner_of(model, optimizer={"learning_rate": 1e-2})
    before = learner.logprobs(GIVEN)
    learner.step(BATCH)
    snapshot = learner.snapshot(1, torch.bfloat16, GIVEN)
    sent = {name: tensor.cpu() for name, tensor in snapshot.source}
    expected = {name: local(p.detach()).cpu().bfloat16() for name, p in learner.student.model.named_parameters()}
    assert sent.keys() == expected.keys() and all(torch.equal(sent[name], expected[name]) for name in sent)
    served = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    missing, unexpected = served.load_state_dict(sent, strict=False)
    assert (missing, unexpected) in ([], ["lm_head.weight"]) or (missing, unexpected) == (["lm_head.weight"], [])
    theirs = logprobs_of(served.to(DEVICE), GIVEN)
    assert mean_difference(snapshot.canary_logprobs, theirs) <= 0.05
    assert mean_difference(before, theirs) > 0.2


@torch.no_grad()
def logprobs_of(model: Any, given: GivenTokens) -> list[np.ndarray]:
    """By transformers alone, each sequence by itself."""
    found = []
    for prompt, completion in zip(given.prompts, given.completions, strict=True):
        ids = torch.tensor([*prompt, *completion], device=DEVICE)
        logprobs = model(ids[None]).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append(logprobs.gather(1, ids[len(prompt) :, None])[:, 0].cpu().numpy())
    return found


def mean_difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return float(np.abs(np.concatenate(ours) - np.concatenate(theirs)).mean())
