"""Tokens that the student did not sample: they are context, and nothing is learned from them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from services.config import LossConfig, RunConfig
from services.errors import PeerError
from services.wire.batch import TrainingBatch, decode_batch, encode_batch
from services.wire.document import decode_document, encode_document
from tests.unit.trainer.samples import BATCH, batch_of, sample
from trainer.batch import loss_inputs, pack
from trainer.groups import ScoredSample
from trainer.loss import LossTotals, minillm_loss
from trainer.student import Student, load_student


@pytest.fixture(scope="module")
def student(tiny_model_folder: Any) -> Student:
    return load_student(RunConfig(student={"model": tiny_model_folder("qwen3")}).student)


def masked(scored: ScoredSample, mask: list[bool]) -> ScoredSample:
    return replace(scored, rollout=replace(scored.rollout, loss_mask=np.array(mask)))


def gradient(student: Student, batch: TrainingBatch) -> torch.Tensor:
    (packed,) = pack(batch, LossConfig(), 10_000)
    totals = LossTotals.of(packed.loss_mask, packed.cu_seqlens, 16)
    student.zero_grad()
    output = student(packed.input_ids, packed.positions, packed.token_ids, packed.support_ids)
    minillm_loss(loss_inputs(packed, output), LossConfig(), totals)[0].backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def test_a_mask_goes_through_the_document_to_the_loss() -> None:
    mask = [True, False, False, True]
    batch = decode_batch(encode_batch(batch_of([masked(sample(1, 3, 4), mask), sample(2, 3, 2)])))
    assert batch.counts().tolist() == [*mask, True, True]
    (packed,) = pack(batch, LossConfig(), 10_000)
    of_sample = dict(
        zip(packed.samples.tolist(), packed.loss_mask.split(packed.cu_seqlens.diff().tolist()), strict=True)
    )
    assert of_sample[0].tolist() == mask and of_sample[1].tolist() == [True, True]


def test_a_batch_without_a_mask_counts_every_token_and_carries_none() -> None:
    assert len(BATCH.loss_mask) == 0 and BATCH.counts().tolist() == [True] * len(BATCH.token_ids)


def test_what_is_said_of_a_masked_token_changes_no_gradient(student: Student) -> None:
    """Of the last token, which is no context of others."""
    before = masked(sample(1, 3, 4), [True, True, True, False])
    changed = replace(
        before,
        teacher_token_logprobs=np.append(before.teacher_token_logprobs[:3], np.float32(-9.0)),
        rollout=replace(
            before.rollout,
            completion=replace(
                before.rollout.completion,
                token_ids=np.append(before.rollout.completion.token_ids[:3], np.int32(7)),
                rollout_logprobs=np.append(before.rollout.completion.rollout_logprobs[:3], np.float32(0.0)),
            ),
        ),
    )
    found = gradient(student, batch_of([before]))
    torch.testing.assert_close(gradient(student, batch_of([changed])), found)
    assert not torch.allclose(gradient(student, batch_of([sample(1, 3, 4)])), found)


def test_a_completion_of_which_nothing_counts_leaves_no_gradient(student: Student) -> None:
    assert not gradient(student, batch_of([masked(sample(1, 3, 2), [False, False])])).any()


def test_a_mask_of_another_length_is_no_batch() -> None:
    document = encode_batch(replace(BATCH, loss_mask=np.ones(3, np.bool_)))
    with pytest.raises(PeerError, match="holds 3 loss_mask for"):
        decode_batch(document)


def test_a_batch_that_was_recorded_before_there_were_masks_is_read() -> None:
    arrays, metadata = decode_document(encode_batch(BATCH))
    del arrays["loss_mask"]
    assert decode_batch(encode_document(dict(arrays), metadata)).counts().all()
