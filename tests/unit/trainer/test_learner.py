"""One batch to one or more updates: what is accumulated, what the second update sees, what is reported."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.config import RunConfig
from services.errors import DistillServeError
from services.wire.batch import TrainingBatch
from tests.models import save_model
from tests.unit.trainer.samples import BATCH, SAMPLES, batch_of
from tests.unit.trainer.sgd_learners import WINDOWS, learner_of
from trainer.batch import loss_inputs, pack, pack_texts
from trainer.learner import Learner
from trainer.loss import LossTotals, minillm_loss
from trainer.student import load_student

TEXTS: dict[str, Any] = {"loss": {"alpha_lm": 0.5}, "data": {"lm_path": "texts.jsonl"}}


def weights(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.student.parameters()])


def metrics_of(learner: Learner, batch: TrainingBatch) -> dict[str, float]:
    """Those of a step, without the time and the memory that it took."""
    metrics = learner.step(batch)
    assert metrics.pop("train_s") > 0 and 0.05 < metrics.pop("peak_memory_gib") < 64
    return metrics


def test_micro_batches_do_not_change_the_update(tiny_model_folder) -> None:  # type: ignore[no-untyped-def]
    runs = [
        learner_of(tiny_model_folder("qwen3"), pipeline={"tokens_per_micro_batch": limit, "updates_per_batch": 2})
        for limit in (10_000, 12)
    ]
    metrics = [metrics_of(run, BATCH) for run in runs]
    assert len(pack(BATCH, runs[1].config.loss, 12)) > 2
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=0, atol=1e-5)


def test_a_longrope_student_learns_the_same_from_any_micro_batches(tmp_path: Path) -> None:
    """Samples and texts are shorter and longer than the length at which its rotary frequencies switch."""
    folder = save_model(tmp_path, "phi3")
    runs = [learner_of(folder, pipeline={"tokens_per_micro_batch": limit}, **TEXTS) for limit in (10_000, 1)]
    batch = batch_of(SAMPLES, [list(range(20)), *WINDOWS])
    metrics = [metrics_of(run, batch) for run in runs]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=0, atol=1e-5)


def by_hand(run: Any, num_updates: int) -> None:
    """What `step` should do with SAMPLES in one micro-batch, updates against the first one's policy."""
    (batch,) = pack(BATCH, run.config.loss, 10_000)
    totals, old = LossTotals.of(batch.loss_mask, batch.cu_seqlens, run.config.sampling.max_new_tokens), None
    for _ in range(num_updates):
        output = run.student(
            batch.input_ids,
            batch.positions,
            batch.token_ids,
            batch.support_ids,
            run.config.loss.kd_temperature,
        )
        minillm_loss(loss_inputs(batch, output, old), run.config.loss, totals)[0].backward()
        torch.nn.utils.clip_grad_norm_(run.student.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        old = output.token_logprobs.detach() if old is None else old


@pytest.mark.parametrize(
    "sections",
    [
        {"pipeline": {"updates_per_batch": 3}, "loss": {"gamma": 0.9, "clip_low": 0.3}},
        {"loss": {"kd_temperature": 1.5}, "sampling": {"temperature": 1.5}},
        {"loss": {"aggregation": "constant"}, "sampling": {"max_new_tokens": 12}},
    ],
    ids=str,
)
def test_an_update_is_the_loss_by_hand(sections: dict[str, Any], tiny_model_folder) -> None:  # type: ignore[no-untyped-def]
    run, expected = (learner_of(tiny_model_folder("qwen3"), **sections) for _ in range(2))
    run.step(BATCH)
    by_hand(expected, run.config.pipeline.updates_per_batch)
    torch.testing.assert_close(weights(run), weights(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("updates", [1, 3])
def test_the_schedule_moves_once_a_batch(updates: int, tiny_model_folder) -> None:  # type: ignore[no-untyped-def]
    run = learner_of(tiny_model_folder("qwen3"), pipeline={"updates_per_batch": updates})
    run.step(BATCH)
    run.step(batch_of([]))
    assert run.schedule.last_epoch == 2


def test_metrics_are_the_first_updates_and_clipping_the_lasts(tiny_model_folder) -> None:  # type: ignore[no-untyped-def]
    once = learner_of(tiny_model_folder("qwen3"), learning_rate=1.0, loss={"gamma": 1.0})
    often = learner_of(
        tiny_model_folder("qwen3"), learning_rate=1.0, loss={"gamma": 1.0}, pipeline={"updates_per_batch": 4}
    )
    first, all_four = metrics_of(once, BATCH), metrics_of(often, BATCH)
    assert first.pop("policy_ratio_clipped_fraction") == 0.0
    assert all_four.pop("policy_ratio_clipped_fraction") > 0.0
    assert all_four == pytest.approx(first, rel=1e-5)
    assert not torch.equal(weights(once), weights(often))


def test_texts_add_their_mean_cross_entropy(tiny_model_folder) -> None:  # type: ignore[no-untyped-def]
    options = {"data": {"lm_path": "t.jsonl"}, "optimizer": {"max_grad_norm": 1e9}}
    pipeline = {"tokens_per_micro_batch": 4}
    # Texts are not softened by the temperature of the distillation.
    loss, sampling = {"kd_temperature": 2.0}, {"temperature": 2.0}
    run = learner_of(
        tiny_model_folder("qwen3"),
        1.0,
        loss={**loss, "alpha_lm": 0.5},
        sampling=sampling,
        pipeline=pipeline,
        **options,
    )
    without = learner_of(
        tiny_model_folder("qwen3"),
        1.0,
        loss=loss,
        sampling=sampling,
        optimizer=options["optimizer"],
        pipeline={"tokens_per_micro_batch": 4},
    )
    start = weights(run)
    model = load_student(run.config.student).model
    losses = [
        -model(torch.tensor([w])).logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(w[1:])[:, None])
        for w in WINDOWS
    ]
    cross_entropy = torch.cat(losses).mean()
    cross_entropy.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])

    metrics = run.step(batch_of(SAMPLES, WINDOWS))
    without.step(BATCH)
    assert len(pack_texts(WINDOWS, 4)) == 3
    assert metrics["lm_loss"] == pytest.approx(float(cross_entropy.detach()), rel=1e-5)
    torch.testing.assert_close(weights(run) - weights(without), -0.5 * gradient, rtol=0, atol=1e-5)
    assert not torch.equal(weights(run), start)


def with_value(value: float) -> TrainingBatch:
    """The batch, with one impossible number of the teacher."""
    logprobs = BATCH.teacher_token_logprobs.copy()
    logprobs[3] = value
    return replace(BATCH, teacher_token_logprobs=logprobs)


def adam(folder: str, **sections: Any) -> Learner:
    config = RunConfig(
        student={"model": folder}, optimizer={"learning_rate": 1e-2} | sections.pop("optimizer", {}), **sections
    )
    return Learner(config, load_student(config.student), 9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped_and_counted(value: float, tiny_model_folder: Any) -> None:
    """Weights and optimizer are, byte for byte, those of a run without it."""
    run, without = adam(tiny_model_folder("qwen3")), adam(tiny_model_folder("qwen3"))
    for learner in (run, without):
        assert metrics_of(learner, BATCH)["num_skipped_updates"] == 0.0
    skipped = metrics_of(run, with_value(value))
    num_tokens = len(BATCH.token_ids)
    assert skipped == {
        "num_valid_tokens": num_tokens,
        "learning_rate": skipped["learning_rate"],
        "num_skipped_updates": 1,
    }
    assert torch.equal(weights(run), weights(without)) and run.finished_step == 2
    without.schedule.step()
    for learner in (run, without):
        assert "loss" in metrics_of(learner, BATCH)
    assert torch.equal(weights(run), weights(without))


def test_of_several_updates_those_from_the_bad_one_on_are_skipped(tiny_model_folder: Any) -> None:
    once = adam(tiny_model_folder("qwen3"))
    often = adam(tiny_model_folder("qwen3"), pipeline={"updates_per_batch": 3})
    apply, norms = often._apply, iter([False, True])

    def second_is_bad() -> float:
        if next(norms):
            next(iter(often.student.parameters())).grad[0] = math.nan  # type: ignore[index]
        return apply()

    often._apply = second_is_bad  # type: ignore[method-assign]
    expected, found = metrics_of(once, BATCH), metrics_of(often, BATCH)
    assert found == pytest.approx(expected | {"num_skipped_updates": 2.0})
    assert torch.equal(weights(once), weights(often))


def test_too_many_in_a_row_end_the_run_and_good_ones_between_do_not_count(tiny_model_folder: Any) -> None:
    run, bad = adam(tiny_model_folder("qwen3"), optimizer={"max_skipped_updates": 2}), with_value(math.nan)
    for batch in (bad, bad, BATCH, bad, bad):
        run.step(batch)
    before = weights(run)
    with pytest.raises(DistillServeError, match=r"norm is nan, and 2 updates before .*optimizer\.max_skipped_updates"):
        run.step(bad)
    assert torch.equal(weights(run), before) and run.finished_step == 5


def test_a_batch_without_trained_tokens_changes_nothing(tiny_model_folder) -> None:  # type: ignore[no-untyped-def]
    run = learner_of(tiny_model_folder("qwen3"), loss={"truncated": "drop"})
    start = weights(run)
    cut = [
        replace(s, rollout=replace(s.rollout, completion=replace(s.rollout.completion, finish_reason="length")))
        for s in SAMPLES
    ]
    assert metrics_of(run, batch_of(cut)) == {"num_valid_tokens": 0.0}
    assert torch.equal(weights(run), start)


def test_texts_are_learned_even_from_a_batch_without_trained_tokens(tiny_model_folder) -> None:  # type: ignore[no-untyped-def]
    run = learner_of(tiny_model_folder("qwen3"), loss={"alpha_lm": 0.5}, data={"lm_path": "t.jsonl"})
    start = weights(run)
    metrics = run.step(batch_of([], WINDOWS))
    assert metrics["lm_loss"] > 0 and metrics["loss"] == metrics["num_valid_tokens"] == 0.0
    assert not torch.equal(weights(run), start)
