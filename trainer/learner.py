"""What learns: one batch, one or more optimizer steps; and what is asked of the student besides.

Synchronous, in the main thread; whatever is collective over ranks happens in the order of the calls.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from services.config import LossConfig, RunConfig
from services.errors import DistillServeError
from services.models.padding import PaddedSequences, cut_by_padded_tokens, pad_sequences
from services.weight_transfer.source import CheckpointSource
from services.wire.batch import TrainingBatch
from trainer.batch import MicroBatch, loss_inputs, pack, pack_texts
from trainer.data.stream import RowStream
from trainer.loss import (
    LossTotals,
    estimate_reverse_kl,
    language_model_loss,
    merge_metrics,
    minillm_loss,
)
from trainer.loss.head import HeadOutput
from trainer.optimizer import build_optimizer, build_schedule
from trainer.student import Student, evaluating
from trainer.weights.snapshot import GivenTokens, WeightSnapshot

logger = logging.getLogger(__name__)


class Learner:
    """The student with its optimizer.

    Args:
        student: on the device where it trains.
        num_steps: of the run, for the schedule.
        texts: windows of data.lm_path, whose cross-entropy is learned as well.
        check: called where a step may be given up, which it is when this raises.

    Attributes:
        finished_step: the step whose updates the student holds.
    """

    def __init__(
        self,
        config: RunConfig,
        student: Student,
        num_steps: int,
        texts: RowStream[list[int]] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.student, self.texts, self._check = config, student, texts, check
        self.optimizer: torch.optim.Optimizer = build_optimizer(student, config.optimizer)
        self.schedule = build_schedule(self.optimizer, config.optimizer, num_steps)
        self.finished_step = 0
        self._skipped_in_a_row = 0

    # ------------------------------------------------------------------------------------------ training

    def step(self, batch: TrainingBatch) -> dict[str, float]:
        """Update the student on one batch, `pipeline.updates_per_batch` times.

        Returns:
            metrics, means over the batch's trained tokens, of the first update, when the student still is the policy that
            sampled; of clipping, that of the last update. "loss" is without the texts' part, which is alpha_lm times
            "lm_loss". Only the counts when there is nothing to train on. "train_s" is the time of the call in seconds.
            An update whose gradient is not finite is skipped, with those after it on this batch: the weights and the
            optimizer stay as they are, and "num_skipped_updates" counts it.

        Raises:
            DistillServeError: more than `optimizer.max_skipped_updates` in a row were not finite.
        """
        started = time.monotonic()
        with self._all_updates_or_none():
            metrics = self._update(batch)
        self.finished_step += 1
        return metrics | {"train_s": time.monotonic() - started}

    def _update(self, batch: TrainingBatch) -> dict[str, float]:
        config, switch = self.config, self.student.rope_switch
        micro_batches = pack(batch, config.loss, config.pipeline.micro_batch_tokens, switch)
        longest = config.sampling.max_new_tokens
        totals = LossTotals.sum([LossTotals.of(m.loss_mask, m.cu_seqlens, longest) for m in micro_batches]).over_ranks()
        texts = [] if self.texts is None else self.texts.take(config.pipeline.texts_per_step)
        text_batches = pack_texts(texts, config.pipeline.micro_batch_tokens, switch)
        learning_rate = self.schedule.get_last_lr()[0]
        if totals.num_valid_tokens == 0 and not texts:
            self.schedule.step()
            return {"num_valid_tokens": 0.0}
        # Log-probabilities before the first update: those of its own forward passes.
        old: list[torch.Tensor] | None = None
        updates: list[dict[str, float]] = []
        num_skipped = 0
        for _ in range(config.pipeline.updates_per_batch):
            metrics, of_update = self._backward(micro_batches, totals, old)
            old = of_update if old is None else old
            metrics |= self._backward_texts(text_batches)
            norm = self._apply()
            if not math.isfinite(norm):
                num_skipped = config.pipeline.updates_per_batch - len(updates)
                self._count_skipped(norm)
                break
            self._skipped_in_a_row = 0
            updates.append(metrics | {"grad_norm": norm})
        self.schedule.step()
        # Of no update there are no numbers: they may be no numbers.
        of_step = updates[0] if updates else {"num_valid_tokens": float(totals.num_valid_tokens)}
        clipped = {name: updates[-1][name] for name in ("policy_ratio_clipped_fraction",) if name in of_step}
        return of_step | clipped | {"learning_rate": float(learning_rate), "num_skipped_updates": float(num_skipped)}

    @contextmanager
    def _all_updates_or_none(self) -> Iterator[None]:
        """With several updates a batch, put the weights back when one of them fails: a step is finished or has not been."""
        if self.config.pipeline.updates_per_batch == 1:
            yield
            return
        before = [p.detach().to("cpu", copy=True) for p in self.student.parameters()]
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for parameter, value in zip(self.student.parameters(), before, strict=True):
                    parameter.copy_(value)
            raise

    def _backward(
        self, micro_batches: list[MicroBatch], totals: LossTotals, old: list[torch.Tensor] | None
    ) -> tuple[dict[str, float], list[torch.Tensor]]:
        """Accumulate the gradient of the whole batch.

        Args:
            old: [N] of each micro-batch, log q before the first update on this batch; None on that update.

        Returns:
            metrics, and [N] of each micro-batch, the log-probabilities of this pass.
        """
        collected, logprobs, total_loss = [], [], 0.0
        for index, micro_batch in enumerate(micro_batches):
            self._check()
            batch = micro_batch.to(self.student.device)
            output = self._forward(batch, batch.support_ids, self.config.loss.kd_temperature)
            inputs = loss_inputs(batch, output, None if old is None else old[index])
            loss, metrics = minillm_loss(inputs, self.config.loss, totals)
            loss.backward()
            collected.append(metrics)
            logprobs.append(output.token_logprobs.detach())
            total_loss += float(loss.detach())  # micro-batch losses add up to the step's
        merged = merge_metrics(collected) if collected else {"num_valid_tokens": 0.0}
        return {"loss": total_loss, **merged}, logprobs

    def _backward_texts(self, batches: list[PaddedSequences]) -> dict[str, float]:
        """Accumulate the gradient of alpha_lm * L_PT; the cross-entropy per token as a metric where there are texts."""
        if not batches:
            return {}
        num_tokens = sum(len(batch.token_ids) for batch in batches)
        total = 0.0
        for text_batch in batches:
            self._check()
            batch = text_batch.to(self.student.device)
            nothing = batch.token_ids.new_empty((len(batch.token_ids), 0))
            loss = language_model_loss(self._forward(batch, nothing).token_logprobs, num_tokens)
            (self.config.loss.alpha_lm * loss).backward()
            total += float(loss.detach())
        return {"lm_loss": total}

    def _apply(self) -> float:
        """Clip and step, unless the gradient's norm is not finite; returns the norm."""
        largest = self.config.optimizer.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.student.parameters(), largest))
        if math.isfinite(norm):
            self._check()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _count_skipped(self, norm: float) -> None:
        self._skipped_in_a_row += 1
        most = self.config.optimizer.max_skipped_updates
        if self._skipped_in_a_row > most:
            raise DistillServeError(
                f"the gradient norm is {norm}, and {most} updates before this one were skipped for that reason "
                "(optimizer.max_skipped_updates); lower optimizer.learning_rate or look at the data"
            )
        logger.warning("the gradient norm of step %d is %s: the update is skipped", self.finished_step + 1, norm)

    def _forward(self, batch: PaddedSequences, support_ids: torch.Tensor, temperature: float = 1.0) -> HeadOutput:
        output: HeadOutput = self.student(batch.input_ids, batch.positions, batch.token_ids, support_ids, temperature)
        return output

    # ----------------------------------------------------------------------------------------- measuring

    @torch.no_grad()
    def logprobs(self, given: GivenTokens) -> list[np.ndarray]:
        """Log-probabilities of the tokens of each completion, [T] float32, at temperature 1 and without dropout."""
        found: list[np.ndarray] = [np.empty(0)] * len(given.completions)
        sequences = given.sequences
        limit, switch = self.config.pipeline.micro_batch_tokens, self.student.rope_switch
        with evaluating(self.student):
            for group in cut_by_padded_tokens([len(s) for s in sequences], limit, boundary=switch):
                batch = pad_sequences(
                    [sequences[index] for index in group], [len(given.prompts[index]) for index in group]
                ).to(self.student.device)
                scored = self._forward(batch, batch.token_ids.unsqueeze(-1)).token_logprobs.float().cpu().numpy()
                ends = np.cumsum([len(given.completions[index]) for index in group])
                for index, part in zip(group, np.split(scored, ends[:-1]), strict=True):
                    found[index] = part
        return found

    @torch.no_grad()
    def reverse_kl(self, batch: TrainingBatch) -> list[tuple[float, int]]:
        """For each completion, sampled at temperature 1: the reverse KL summed over its tokens, nats, and their number."""
        found = []
        with evaluating(self.student):
            # The order of micro-batches does not matter: they are added up.
            for micro_batch in pack(
                batch, LossConfig(), self.config.pipeline.micro_batch_tokens, self.student.rope_switch
            ):
                lengths = micro_batch.cu_seqlens.diff().tolist()
                on_device = micro_batch.to(self.student.device)
                output = self._forward(on_device, on_device.support_ids)
                per_token = estimate_reverse_kl(loss_inputs(on_device, output)).double().cpu()
                found += [(float(part.sum()), len(part)) for part in per_token.split(lengths)]
        return found

    # ------------------------------------------------------------------------------------------- weights

    def snapshot(self, version: int, dtype: torch.dtype, canary: GivenTokens) -> WeightSnapshot:
        """The weights as they are to be sent, and what they say of the canary; valid until the next step.

        Args:
            dtype: of the rollout servers.
            canary: tokens that the servers score under the new weights.
        """
        return WeightSnapshot(version, CheckpointSource(self.student.model, dtype), self.logprobs(canary))
