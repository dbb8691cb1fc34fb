"""One optimizer step: micro-batches through the student, the MiniLLM loss, AdamW."""

import math

import torch

from services.errors import DistillServeError
from trainer.batch import MicroBatch, pack
from trainer.lm_head import HeadOutput
from trainer.loss import LossInputs, LossTotals, merge_metrics, minillm_loss
from trainer.model import student_logprobs
from trainer.session import Session
from trainer.teacher_scores import ScoredSample


def optimize(run: Session, samples: list[ScoredSample]) -> dict[str, float]:
    """Update the student on one batch.

    Returns:
        metrics, means over the step's trained tokens; only the counts when no token is left to train on.

    Raises:
        DistillServeError: the gradient is not finite; the weights are untouched.
    """
    config = run.config
    micro_batches = pack(samples, config.loss, config.pipeline.tokens_per_micro_batch)
    longest = config.sampling.max_new_tokens
    totals = LossTotals.sum([LossTotals.of(m.loss_mask, m.cu_seqlens, longest) for m in micro_batches])
    if totals.num_valid_tokens == 0:
        return {"num_valid_tokens": 0.0}
    collected, total_loss = [], 0.0
    for micro_batch in micro_batches:
        loss, metrics = _forward(run, micro_batch.to(run.accelerator.device), totals)
        run.accelerator.backward(loss)
        collected.append(metrics)
        total_loss += float(loss.detach())  # micro-batch losses add up to the step's
    grad_norm = run.accelerator.clip_grad_norm_(run.model.parameters(), config.optimizer.max_grad_norm)
    if not math.isfinite(float(grad_norm)):
        raise DistillServeError(
            f"the gradient norm is {float(grad_norm)}; lower optimizer.learning_rate or look at the data"
        )
    learning_rate = run.schedule.get_last_lr()[0]
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    return {
        "loss": total_loss,
        **merge_metrics(collected),
        "grad_norm": float(grad_norm),
        "learning_rate": float(learning_rate),
    }


def _forward(run: Session, batch: MicroBatch, totals: LossTotals) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config = run.config
    output = student_logprobs(
        run.model,
        batch.input_ids,
        batch.attention_mask,
        batch.positions,
        batch.token_ids,
        batch.support_ids,
        temperature=config.loss.kd_temperature,
    )
    return minillm_loss(loss_inputs(batch, output), config.loss, totals)


def loss_inputs(batch: MicroBatch, output: HeadOutput) -> LossInputs:
    """Student and teacher side by side, position by position."""
    return LossInputs(
        student_token_logprobs=output.token_logprobs,
        student_support_logprobs=output.support_logprobs,
        student_tail_logprob=output.tail_logprob,
        student_entropies=output.entropy,
        rollout_logprobs=batch.rollout_logprobs,
        teacher_token_logprobs=batch.teacher_token_logprobs,
        teacher_support_logprobs=batch.teacher_support_logprobs,
        teacher_tail_logprob=batch.teacher_tail_logprob,
        support_ids=batch.support_ids,
        token_ids=batch.token_ids,
        loss_mask=batch.loss_mask,
        cu_seqlens=batch.cu_seqlens,
    )
