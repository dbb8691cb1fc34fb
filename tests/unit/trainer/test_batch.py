"""Tokens, positions and logprobs line up: against each sequence run alone through the student's own head."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.config import LossConfig, RewardConfig, RunConfig
from services.wire.batch import decode_batch, encode_batch
from tests.models import LONGROPE_SWITCH, save_model
from tests.unit.trainer.samples import BATCH, SAMPLES, batch_of, sample
from trainer.batch import MicroBatch, collect, loss_inputs, pack, pack_texts
from trainer.groups import PromptGroup
from trainer.loss import LossTotals, minillm_loss
from trainer.student import Student, load_student
from trainer.teacher_scores import ScoredSample


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = save_model(tmp_path_factory.mktemp("student"), request.param)
    return load_student(RunConfig(student={"model": folder}).student)


def forward(student: Student, batch: MicroBatch):  # type: ignore[no-untyped-def]
    return student(batch.input_ids, batch.positions, batch.token_ids, batch.support_ids)


def test_every_completion_token_is_scored_by_the_state_before_it(student: Student) -> None:
    for batch in pack(BATCH, LossConfig(), tokens_per_micro_batch=30):
        output = forward(student, batch)
        for index, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
            ids = batch.token_ids[start:end].tolist()
            owner = next(s for s in SAMPLES if s.rollout.completion.token_ids.tolist() == ids)
            sequence = torch.tensor([owner.rollout.sequence])
            alone = student.model(sequence).logits[0].log_softmax(-1)[len(owner.rollout.prompt.token_ids) - 1 : -1]
            expected = alone.gather(1, batch.token_ids[start:end, None]).squeeze(1)
            assert torch.allclose(output.token_logprobs[start:end], expected, atol=1e-5), index
            support = alone.gather(1, batch.support_ids[start:end])
            assert torch.allclose(output.support_logprobs[start:end], support, atol=1e-5)
            assert batch.rollout_logprobs[start:end].tolist() == owner.rollout.completion.rollout_logprobs.tolist()
            assert batch.teacher_token_logprobs[start:end].tolist() == owner.teacher_token_logprobs.tolist()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_cutting_and_order_change_neither_loss_nor_gradient(aggregation: str, student: Student) -> None:
    config = LossConfig(gamma=0.9, aggregation=aggregation)  # type: ignore[arg-type]

    def step(samples: list[ScoredSample], limit: int) -> tuple[float, torch.Tensor]:
        student.zero_grad()
        total = 0.0
        batches = pack(batch_of(samples), config, limit)
        totals = LossTotals.sum([LossTotals.of(b.loss_mask, b.cu_seqlens, 16) for b in batches])
        for batch in batches:
            loss = minillm_loss(loss_inputs(batch, forward(student, batch)), config, totals)[0]
            loss.backward()
            total += float(loss.detach())
        return total, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    loss, gradient = step(SAMPLES, 10_000)
    assert gradient.abs().max() > 1e-2
    for samples, limit in ((SAMPLES, 1), (SAMPLES[::-1], 10_000), (SAMPLES[::-1], 30)):
        other_loss, other_gradient = step(samples, limit)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert torch.allclose(other_gradient, gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 12, 22, 1000])
def test_micro_batches_stay_within_their_tokens_or_hold_one_sample(limit: int) -> None:
    batches = pack(BATCH, LossConfig(), limit)  # sequences of 8, 2, 9, 11 and 8 tokens
    assert [list(b.input_ids.shape) for b in batches] == {
        1: [[1, 11], [1, 9], [1, 8], [1, 8], [1, 2]],
        12: [[1, 11], [1, 9], [1, 8], [1, 8], [1, 2]],
        22: [[2, 11], [2, 8], [1, 2]],
        1000: [[5, 11]],
    }[limit]
    assert sum(len(b.token_ids) for b in batches) == 21


def test_positions_point_at_the_states_before_the_completion_tokens() -> None:
    (batch,) = pack(
        batch_of([sample(0, 3, 2), sample(1, 1, 3)]), LossConfig(), 1000
    )  # rows of 5 and 4 tokens, padded to 5
    assert batch.positions.tolist() == [2, 3, 5, 6, 7]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]


@pytest.mark.parametrize(("truncated", "expected"), [("train", [0, 1]), ("mask", [1]), ("drop", [1])])
def test_truncated_completions_are_trained_on_or_not(truncated: str, expected: list[int]) -> None:
    samples = [sample(0, 2, 3, "length"), sample(1, 2, 2, "stop")]
    (batch,) = pack(batch_of(samples), LossConfig(truncated=truncated), 1000)  # type: ignore[arg-type]
    completions = [samples[index].rollout.completion.token_ids.tolist() for index in expected]
    assert sorted(part.tolist() for part in batch.token_ids.tensor_split(batch.cu_seqlens[1:-1])) == sorted(completions)
    assert batch.loss_mask.all()


def test_what_came_of_a_step_without_samples_is_a_batch_of_nothing() -> None:
    batch = decode_batch(encode_batch(collect([], {"rollout_s": 1.5})))
    assert batch.metrics == {"rollout_s": 1.5} and batch_of([]).metrics == {}
    assert len(batch) == len(batch.token_ids) == len(batch.support_ids) == 0


def test_a_group_is_known_by_its_place_and_a_sample_by_its_version() -> None:
    first, second, third = (replace(s, rollout=replace(s.rollout, policy_version=i)) for i, s in enumerate(SAMPLES[:3]))
    prompt = first.rollout.prompt
    groups = [
        PromptGroup(4, prompt, [], [second, first]),
        PromptGroup(7, prompt, [], []),
        PromptGroup(9, prompt, [], [third]),
    ]
    batch = collect(groups)
    assert batch.groups.tolist() == [4, 4, 9] and batch.policy_versions.tolist() == [1, 0, 2]


def test_dropping_everything_leaves_no_batch() -> None:
    assert pack(batch_of([sample(0, 2, 3, "length")]), LossConfig(truncated="drop"), 1000) == []


def test_a_longrope_student_is_scored_as_each_sequence_alone(tmp_path: Path) -> None:
    """Beside a longer row, a short one would get the rotary frequencies of long sequences."""
    student = load_student(RunConfig(student={"model": save_model(tmp_path, "phi3")}).student)
    samples = [sample(i, 2, length) for i, length in enumerate([2, 30, 6, 7, 1, 20])]
    assert student.rope_switch == LONGROPE_SWITCH == len(samples[2].rollout.sequence)
    batches = pack(batch_of(samples), LossConfig(), 10_000, student.rope_switch)
    assert [len(batch.input_ids) for batch in batches] == [3, 3]
    for batch in batches:
        logprobs = forward(student, batch).token_logprobs
        for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            owner = next(
                s for s in samples if s.rollout.completion.token_ids.tolist() == batch.token_ids[start:end].tolist()
            )
            alone = student.model(torch.tensor([owner.rollout.sequence])).logits[0, 1:-1].log_softmax(-1)
            expected = alone.gather(1, batch.token_ids[start:end, None]).squeeze(1)
            torch.testing.assert_close(logprobs[start:end], expected, atol=1e-5, rtol=0)
    windows = [s.rollout.sequence for s in samples]
    assert sorted(len(batch.input_ids) for batch in pack_texts(windows, 10_000, student.rope_switch)) == [3, 3]
    assert [len(batch.input_ids) for batch in pack_texts(windows, 10_000)] == [6]


def test_every_token_of_a_window_but_the_first_is_predicted() -> None:
    (batch,) = pack_texts([[5, 6, 7], [8, 9]], 100)
    assert [row[:length] for row, length in zip(batch.input_ids.tolist(), (3, 2), strict=True)] == [[5, 6, 7], [8, 9]]
    assert batch.positions.tolist() == [0, 1, 3] and batch.token_ids.tolist() == [6, 7, 9]


def test_all_columns_of_a_batch_go_to_the_device() -> None:
    rewarded = replace(BATCH, rewards=np.zeros((len(BATCH), 1)), reward_names=["f"])
    with_rewards = pack(rewarded, LossConfig(), 1000, rewards=RewardConfig(functions=["m:f"]))
    for batch in (*with_rewards, *pack_texts([[5, 6]], 100)):
        moved = vars(batch.to(torch.device("meta")))
        assert moved.keys() == vars(batch).keys() and {tensor.device.type for tensor in moved.values()} == {"meta"}
    (without,) = pack(BATCH, LossConfig(), 1000)
    assert without.to(torch.device("meta")).external_advantages is None
