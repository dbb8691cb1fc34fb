"""What a step does with rewards, with the student as it was, and with entropies; by hand, on plain SGD."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.config import RunConfig
from services.errors import PeerError
from services.wire.batch import TrainingBatch
from tests.models import save_model
from tests.unit.trainer.runs import weights_of
from tests.unit.trainer.samples import batch_of, sample
from tests.unit.trainer.sgd_learners import learner_of
from trainer.high_entropy import highest_share
from trainer.learner import Learner
from trainer.parallel import load_reference
from trainer.ranks.group import Ranks
from trainer.weights.snapshot import GivenTokens

ALONE: dict[str, Any] = {"rkl_advantage": False, "single_step_decomposition": False}
REWARD: dict[str, Any] = {"functions": ["m:f"], "advantage": "raw"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("student"), "qwen3")


def on_policy(learner: Learner, batch: TrainingBatch) -> TrainingBatch:
    """The batch as if the student had sampled it."""
    prompts = [batch.prompt(i).tolist() for i in range(len(batch))]
    completions = [batch.token_ids[batch.completion(i)].tolist() for i in range(len(batch))]
    return replace(batch, rollout_logprobs=np.concatenate(learner.logprobs(GivenTokens(prompts, completions))))


def rewarded(*rewards: float, seed: int = 0) -> TrainingBatch:
    """One group of a prompt, with a reward for each completion."""
    samples = [sample(seed + i, 3, 4 + i) for i in range(len(rewards))]
    batch = replace(batch_of(samples), groups=np.zeros(len(rewards), np.int64))
    return replace(batch, rewards=np.array(rewards)[:, None], reward_names=["f"])


def sums(learner: Learner, batch: TrainingBatch) -> list[float]:
    prompts = [batch.prompt(i).tolist() for i in range(len(batch))]
    completions = [batch.token_ids[batch.completion(i)].tolist() for i in range(len(batch))]
    return [float(part.sum()) for part in learner.logprobs(GivenTokens(prompts, completions))]


def moved(folder: str, batch: TrainingBatch, **sections: Any) -> dict[str, torch.Tensor]:
    """By how much one step changes each weight."""
    learner = learner_of(folder, optimizer={"max_grad_norm": 1e9}, **sections)
    before = weights_of(learner.student.model)
    learner.step(on_policy(learner, batch))
    return {name: after - before[name] for name, after in weights_of(learner.student.model).items()}


def norm(change: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in change.values()]).norm())


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return norm({name: a[name] - b[name] for name in a})


@pytest.mark.parametrize("advantage", ["group", "leave_one_out", "raw"])
def test_what_has_the_higher_reward_becomes_likelier_and_the_teacher_has_no_say(advantage: str, folder: str) -> None:
    sections: dict[str, Any] = {
        "reward": REWARD | {"advantage": advantage},
        "loss": ALONE,
        "pipeline": {"samples_per_prompt": 2},
    }
    learner, batch = learner_of(folder, **sections), rewarded(1.0, -1.0)
    before = sums(learner, batch)
    metrics = learner.step(on_policy(learner, batch))
    after = sums(learner, batch)
    assert after[0] > before[0] and after[1] < before[1]
    assert metrics["advantage_std"] > 0 and metrics["advantage_clipped_fraction"] == 0
    other_teacher = replace(batch, teacher_token_logprobs=batch.teacher_token_logprobs - 1)
    assert distance(moved(folder, batch, **sections), moved(folder, other_teacher, **sections)) == 0


def test_the_step_of_rewards_is_a_weight_times_their_step_and_adds_to_the_teachers(folder: str) -> None:
    batch = rewarded(1.0, -0.5, 0.25)
    pipeline = {"samples_per_prompt": 3}
    clip = {"advantage_clip": None}
    alone = moved(folder, batch, reward=REWARD, loss=ALONE | clip, pipeline=pipeline)
    twice = moved(folder, batch, reward=REWARD, loss=ALONE | clip | {"alpha_reward": 2.0}, pipeline=pipeline)
    weighed = moved(folder, batch, reward=REWARD | {"weights": [2.0]}, loss=ALONE | clip, pipeline=pipeline)
    teacher = moved(folder, batch, loss={"gamma": 1.0} | clip)
    both = moved(folder, batch, reward=REWARD, loss={"gamma": 1.0} | clip, pipeline=pipeline)
    measured = moved(folder, batch, reward={"functions": ["m:f"]}, loss={"gamma": 1.0, "alpha_reward": 0.0} | clip)
    assert norm(alone) > 0.01 and norm(teacher) > 0.01
    assert distance(twice, {name: 2 * part for name, part in alone.items()}) < 1e-5 * norm(twice)
    assert distance(weighed, twice) < 1e-6
    assert distance(both, {name: alone[name] + teacher[name] for name in alone}) < 1e-4 * norm(both)
    assert distance(measured, teacher) == 0


def test_groups_that_micro_batches_part_have_the_same_step(folder: str) -> None:
    batch = rewarded(1.0, 0.0, float("nan"), 3.0)
    sections: dict[str, Any] = {"reward": REWARD | {"advantage": "group"}, "loss": ALONE}
    whole, parted = (
        moved(folder, batch, **sections, pipeline={"samples_per_prompt": 4, "tokens_per_micro_batch": limit})
        for limit in (1000, 8)
    )
    assert norm(whole) > 0.01 and distance(whole, parted) < 1e-5


def test_a_second_update_has_the_same_advantages(folder: str) -> None:
    sections: dict[str, Any] = {"reward": REWARD, "loss": ALONE, "learning_rate": 1e-4}
    batch = rewarded(1.0, -1.0)
    once, twice = (
        moved(folder, batch, **sections, pipeline={"samples_per_prompt": 2, "updates_per_batch": count})
        for count in (1, 2)
    )
    assert distance(twice, {name: 2 * part for name, part in once.items()}) < 0.01 * norm(twice)


def test_a_batch_without_rewards_is_refused_where_they_are_learned(folder: str) -> None:
    learner = learner_of(folder, reward=REWARD, loss=ALONE)
    with pytest.raises(PeerError, match="replay it with the functions it was recorded with"):
        learner.step(batch_of([sample(0, 3, 4)]))
    assert learner.finished_step == 0


def test_the_reference_stays_as_the_student_was_and_holds_it_back(folder: str) -> None:
    batch, pipeline = rewarded(1.0, -1.0), {"samples_per_prompt": 2}
    distances, learners = [], []
    for alpha in (0.0, 5.0):
        learner = learner_of(folder, reward=REWARD, loss=ALONE | {"alpha_reference_kl": alpha}, pipeline=pipeline)
        start = weights_of(learner.student.model)
        steps = [learner.step(on_policy(learner, batch)) for _ in range(6)]
        distances.append(distance(weights_of(learner.student.model), start))
        learners.append((learner, steps, start))
    assert distances[1] < 0.8 * distances[0]
    learner, steps, start = learners[1]
    assert learner._reference is not None
    assert distance(weights_of(learner._reference.model), start) == 0
    assert not any(p.requires_grad for p in learner._reference.parameters())
    assert abs(steps[0]["reference_kl"]) < 1e-9 < steps[-1]["reference_kl"]
    assert "reference_kl" not in learners[0][1][0]


def test_the_reference_is_measured_once_for_all_updates_of_a_batch(folder: str) -> None:
    pipeline = {"samples_per_prompt": 2, "updates_per_batch": 3}
    learner = learner_of(folder, reward=REWARD, loss=ALONE | {"alpha_reference_kl": 1.0}, pipeline=pipeline)
    assert learner._reference is not None
    calls: list[int] = []
    learner._reference.register_forward_hook(lambda *_: calls.append(1))
    learner.step(on_policy(learner, rewarded(1.0, -1.0)))
    assert len(calls) == 1


def test_the_entropy_bonus_raises_the_entropy(folder: str) -> None:
    batch = rewarded(0.0, 0.0)
    learner = learner_of(
        folder, 0.5, reward=REWARD, loss=ALONE | {"alpha_entropy": 1.0}, pipeline={"samples_per_prompt": 2}
    )
    entropies = [learner.step(on_policy(learner, batch))["student_entropy"] for _ in range(4)]
    assert entropies == sorted(entropies) and entropies[-1] > entropies[0] + 1e-3


def test_a_policy_gradient_on_the_highest_entropies_looks_at_that_share_of_the_step(folder: str) -> None:
    batch = rewarded(1.0, -0.7, 0.4)
    changes = {}
    for quantile in (1.0, 0.5, 0.0):
        for limit in (1000, 8):
            pipeline = {"samples_per_prompt": 3, "tokens_per_micro_batch": limit}
            loss = ALONE | {"top_entropy_quantile": quantile}
            changes[quantile, limit] = moved(folder, batch, reward=REWARD, loss=loss, pipeline=pipeline)
    for quantile in (1.0, 0.5, 0.0):
        assert distance(changes[quantile, 1000], changes[quantile, 8]) < 1e-5
    assert norm(changes[1.0, 1000]) > 0.01
    assert distance(changes[0.5, 1000], changes[1.0, 1000]) > 1e-3
    assert 0 < norm(changes[0.0, 1000]) < norm(changes[1.0, 1000])


@pytest.mark.parametrize(("share", "expected"), [(1.0, 10), (0.2, 2), (0.5, 5), (0.0, 1)])
def test_the_highest_share_of_ten_tokens(share: float, expected: int) -> None:
    parts = [torch.tensor([0.1, 0.9, 0.3]), torch.tensor([]), torch.tensor([0.2, 0.4, 0.5, 0.8, 0.7, 0.6, 1.0])]
    lowest = highest_share(parts, share, Ranks())
    assert sum(int((part >= lowest).sum()) for part in parts) == expected


def test_no_token_has_no_highest_share() -> None:
    assert highest_share([], 0.2, Ranks()) == -float("inf")


def test_a_reference_is_loaded_where_the_loss_looks_at_it(folder: str, tmp_path: Path) -> None:
    student = {"model": folder}
    assert load_reference(RunConfig(student=student), Ranks()) is None
    reference = load_reference(RunConfig(student=student, loss={"alpha_reference_kl": 0.1}), Ranks())
    assert reference is not None and not reference.training
