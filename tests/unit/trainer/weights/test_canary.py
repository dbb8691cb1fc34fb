"""The second check of a push: what the trainer's own logprobs are compared with, and how far apart they may be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.config import WeightSyncConfig
from services.errors import WeightSyncError
from tests.models import save_model
from tests.pushing import learner_of
from trainer.weights.canary import Canary
from trainer.weights.snapshot import GivenTokens


def canary(
    prompts: list[list[int]],
    completions: list[list[int]],
    *,
    rollout: str = "float32",
    compute: str = "float32",
    **options: Any,
) -> Canary:
    return Canary(WeightSyncConfig(**options), GivenTokens(prompts, completions), dtypes=(rollout, compute))


@torch.no_grad()
def alone(model: Any, sequence: list[int]) -> list[float]:
    """Logprobs of all tokens but the first, by the model's own forward over this sequence alone."""
    logits = model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(sequence[1:])[:, None]).squeeze(1).tolist()


PROMPTS, COMPLETIONS = [[1, 2], [3], [4, 5, 6]], [[7, 8], list(range(20)), [9] * 5]


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "phi3"])  # phi3: longrope, from a length on
@pytest.mark.parametrize("tokens_per_micro_batch", [1, 1000])
def test_the_trainers_logprobs_are_those_of_each_sequence_alone(
    architecture: str, tokens_per_micro_batch: int, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, architecture)
    learner = learner_of(folder, pipeline={"tokens_per_micro_batch": tokens_per_micro_batch})
    scored = canary(PROMPTS, COMPLETIONS)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    theirs = [alone(reference, sequence) for sequence in scored.given.sequences]
    ours = learner.logprobs(scored.given)
    assert [len(row) for row in ours] == [2, 20, 5] and learner.student.training
    for row, expected, tokens in zip(ours, theirs, COMPLETIONS, strict=True):
        assert np.abs(row - expected[-len(tokens) :]).max() < 1e-5
    assert scored.residual(ours, theirs) < 1e-5


def test_only_what_the_student_sampled_is_compared_and_every_token_of_it() -> None:
    scored = canary([[1, 2, 3]], [[4, 5]])
    ours = [np.array([-1.0, -2.0])]
    assert scored.residual(ours, [[9.0, 9.0, -1.0, -2.5]]) == 0.5
    assert scored.residual(ours, [[9.0, 9.0, -1.25, -2.0]]) == 0.25


@pytest.mark.parametrize("theirs", [[], [[-1.0]], [[0.0, 0.0, -1.0]], [[0.0, 0.0, -1.0, -2.0, 0.0]], [[0.0] * 4] * 2])
def test_logprobs_of_something_else_are_refused(theirs: list[list[float]]) -> None:
    with pytest.raises(WeightSyncError, match="not those of its tokens"):
        canary([[1, 2, 3]], [[4, 5]]).residual([np.array([-1.0, -2.0])], theirs)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({}, 0.5),
        ({"rollout": "bfloat16"}, 0.25),
        ({"compute": "bfloat16"}, 0.25),
        ({"rollout": "float16"}, 0.25),
    ],
)
def test_float32_is_judged_by_the_largest_difference_and_half_precision_by_the_mean(
    dtypes: dict[str, str], expected: float
) -> None:
    assert canary([[1]], [[4, 5]], **dtypes).residual([np.array([-1.0, -2.0])], [[-1.0, -2.5]]) == expected


@pytest.mark.parametrize(
    ("rollout", "first", "expected"),
    [
        ("float32", 0.0, 1e-4),
        ("float32", 5e-5, 1.5e-4),
        ("float32", 9e-3, 1e-2),
        ("bfloat16", 0.001, 0.05),
        ("bfloat16", 0.02, 0.06),
        ("bfloat16", 0.09, 0.1),
    ],
)
def test_the_tolerance_is_three_times_what_version_0_showed_between_a_floor_and_a_ceiling(
    rollout: str, first: float, expected: float
) -> None:
    scored = canary([[1]], [[4, 5]], rollout=rollout)
    scored.check(first, "version 0")
    scored.calibrate(first)
    scored.calibrate(99.0)  # the first one counts
    assert scored.tolerance == pytest.approx(expected)
    scored.check(expected * 0.99, "version 1")
    with pytest.raises(
        WeightSyncError, match=r"canary of version 1 on x: its logprobs differ from the trainer's by .*, more"
    ):
        scored.check(expected * 1.01, "version 1 on x")


@pytest.mark.parametrize(("rollout", "wrong"), [("float32", 0.011), ("bfloat16", 0.11), ("float32", float("nan"))])
def test_wrong_weights_at_version_0_do_not_calibrate_themselves(rollout: str, wrong: float) -> None:
    with pytest.raises(WeightSyncError, match="holds other weights than the trainer sent"):
        canary([[1]], [[4, 5]], rollout=rollout).check(wrong, "version 0")


def test_a_tolerance_that_is_given_is_the_tolerance() -> None:
    scored = canary([[1]], [[4, 5]], canary_tolerance=0.02)
    scored.calibrate(1.0)
    scored.check(0.019, "version 1")
    with pytest.raises(WeightSyncError, match=r"more than 0\.02 \(float32\)"):
        scored.check(0.021, "version 1")


def test_dropout_has_no_part_in_it(tmp_path: Path) -> None:
    options = {"disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.9}}
    learner = learner_of(save_model(tmp_path, "llama"), student=options)
    first, second = (np.concatenate(learner.logprobs(GivenTokens(PROMPTS, COMPLETIONS))) for _ in range(2))
    assert first.tolist() == second.tolist() and learner.student.training
