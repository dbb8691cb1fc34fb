"""Rank 0 leads and rank 1 follows with rewards, and with a reference that both hold a part of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.config import RunConfig
from tests.models import save_model
from tests.unit.trainer.samples import BATCH
from tests.unit.trainer.two_ranks import Leading, run_pair
from trainer.learner import Learner
from trainer.parallel import load_reference
from trainer.ranks.group import Ranks
from trainer.student import load_student

REWARDED = replace(
    BATCH,
    groups=np.array([0, 0, 0, 1, 1]),
    rewards=np.array([[1.0, np.nan], [0.0, 2.0], [np.nan, np.nan], [3.0, 0.0], [-3.0, 0.0]]),
    reward_names=["a", "b"],
)


def steps_with_rewards(leading: Leading, into: Path) -> Any:
    steps = [leading.learner.step(REWARDED) for _ in range(3)]
    leading.students.save(leading.learner.state())
    return [{name: step[name] for name in ("loss", "reference_kl", "advantage_std")} for step in steps]


def test_a_step_with_rewards_and_a_reference_is_that_of_one_learner_alone(tmp_path: Path) -> None:
    config = RunConfig(
        student={"model": save_model(tmp_path / "model", "qwen3")},
        reward={"functions": ["m:a", "m:b"]},
        loss={"alpha_reference_kl": 0.5, "alpha_entropy": 0.01, "top_entropy_quantile": 0.5},
        optimizer={"learning_rate": 1e-2},
        pipeline={"tokens_per_micro_batch": 8, "samples_per_prompt": 3},
        output={"dir": str(tmp_path / "out")},
    )
    first, second = run_pair(config, tmp_path, steps_with_rewards)
    alone = Learner(config, load_student(config.student), 10, reference=load_reference(config, Ranks()))
    expected = [alone.step(REWARDED) for _ in range(3)]
    assert expected[2]["reference_kl"] > 1e-4 and expected[0]["advantage_std"] > 0.1
    for ours, theirs in zip(first["result"], expected, strict=True):
        assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-3, abs=1e-6)
    assert second == {"result": None}
    saved = load_student(config.student.model_copy(update={"model": str(tmp_path / "out" / "student")}))
    for ours, theirs in zip(saved.parameters(), alone.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
