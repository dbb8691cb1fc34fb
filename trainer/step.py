"""One batch, one or more optimizer steps: micro-batches through the student, the MiniLLM loss, AdamW."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from services.errors import DistillServeError
from services.models.causal_lm import rope_switch
from trainer.batch import MicroBatch, TextBatch, loss_inputs, pack, pack_texts
from trainer.loss.head import HeadOutput
from trainer.loss.minillm import LossTotals, language_model_loss, merge_metrics, minillm_loss
from trainer.model import compute_dtype_of, student_logprobs
from trainer.session import Session
from trainer.teacher_scores import ScoredSample


def optimize(run: Session, samples: list[ScoredSample]) -> dict[str, float]:
    """Update the student on one batch, `pipeline.updates_per_batch` times.

    Returns:
        metrics, means over the batch's trained tokens, of the first update, when the student still is the policy that
        sampled; of clipping, that of the last. "loss" is without the texts' part, which is alpha_lm times "lm_loss".
        Only the counts when there is nothing to train on.

    Raises:
        DistillServeError: the gradient is not finite, or the run is being stopped; the weights are those of the step before.
    """
    with _all_updates_or_none(run):
        metrics = _update(run, samples)
    run.finished_step += 1
    return metrics


def _update(run: Session, samples: list[ScoredSample]) -> dict[str, float]:
    config = run.config
    switch = rope_switch(run.model)
    micro_batches = pack(samples, config.loss, config.pipeline.micro_batch_tokens, switch)
    longest = config.sampling.max_new_tokens
    totals = LossTotals.sum([LossTotals.of(m.loss_mask, m.cu_seqlens, longest) for m in micro_batches]).over_ranks()
    texts = [] if run.texts is None else run.texts.take(config.pipeline.texts_per_step)
    text_batches = pack_texts(texts, config.pipeline.micro_batch_tokens, switch)
    learning_rate = run.schedule.get_last_lr()[0]
    if totals.num_valid_tokens == 0 and not texts:
        run.schedule.step()
        return {"num_valid_tokens": 0.0}
    # Log-probabilities before the first update: those of its own forward passes.
    old: list[torch.Tensor] | None = None
    updates = []
    for _ in range(config.pipeline.updates_per_batch):
        metrics, of_update = _backward(run, micro_batches, totals, old)
        old = of_update if old is None else old
        updates.append(metrics | _backward_texts(run, text_batches) | {"grad_norm": _apply(run)})
    run.schedule.step()
    clipped = {name: value for name, value in updates[-1].items() if name == "policy_ratio_clipped_fraction"}
    return updates[0] | clipped | {"learning_rate": float(learning_rate)}


@contextmanager
def _all_updates_or_none(run: Session) -> Iterator[None]:
    """With several updates a batch, put the weights back when one of them fails: a step is finished or has not been."""
    if run.config.pipeline.updates_per_batch == 1:
        yield
        return
    before = [p.detach().to("cpu", copy=True) for p in run.model.parameters()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(run.model.parameters(), before, strict=True):
                parameter.copy_(value)
        raise


def _backward(
    run: Session, micro_batches: list[MicroBatch], totals: LossTotals, old: list[torch.Tensor] | None
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Accumulate the gradient of the whole batch.

    Args:
        old: [N] of each micro-batch, log q before the first update on this batch; None on that update.

    Returns:
        metrics, and [N] of each micro-batch, the log-probabilities of this pass.
    """
    collected, logprobs, total_loss = [], [], 0.0
    for index, micro_batch in enumerate(micro_batches):
        _check_not_stopped(run)
        batch = micro_batch.to(run.accelerator.device)
        output = _student(run, batch, batch.support_ids, run.config.loss.kd_temperature)
        inputs = loss_inputs(batch, output, None if old is None else old[index])
        loss, metrics = minillm_loss(inputs, run.config.loss, totals)
        run.accelerator.backward(loss)
        collected.append(metrics)
        logprobs.append(output.token_logprobs.detach())
        total_loss += float(loss.detach())  # micro-batch losses add up to the step's
    merged = merge_metrics(collected) if collected else {"num_valid_tokens": 0.0}
    return {"loss": total_loss, **merged}, logprobs


def _backward_texts(run: Session, batches: list[TextBatch]) -> dict[str, float]:
    """Accumulate the gradient of alpha_lm * L_PT; the cross-entropy per token as a metric where there are texts."""
    if not batches:
        return {}
    num_tokens = sum(len(batch.token_ids) for batch in batches)
    total = 0.0
    for text_batch in batches:
        _check_not_stopped(run)
        batch = text_batch.to(run.accelerator.device)
        nothing = batch.token_ids.new_empty((len(batch.token_ids), 0))
        loss = language_model_loss(_student(run, batch, nothing, 1.0).token_logprobs, num_tokens)
        run.accelerator.backward(run.config.loss.alpha_lm * loss)
        total += float(loss.detach())
    return {"lm_loss": total}


def _check_not_stopped(run: Session) -> None:
    if run.stopping.is_set():
        raise DistillServeError("the step was given up because the run is being stopped")


def _apply(run: Session) -> float:
    """Clip and step; returns the gradient's norm."""
    norm = float(run.accelerator.clip_grad_norm_(run.model.parameters(), run.config.optimizer.max_grad_norm))
    if not math.isfinite(norm):
        raise DistillServeError(f"the gradient norm is {norm}; lower optimizer.learning_rate or look at the data")
    _check_not_stopped(run)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def _student(run: Session, batch: MicroBatch | TextBatch, support_ids: torch.Tensor, temperature: float) -> HeadOutput:
    return student_logprobs(
        run.model,
        batch.input_ids,
        batch.positions,
        batch.token_ids,
        support_ids,
        temperature=temperature,
        compute_dtype=compute_dtype_of(run.config, run.accelerator.device),
    )
