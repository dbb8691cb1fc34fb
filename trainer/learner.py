"""What learns: one batch, one or more optimizer steps; and what is asked of the student besides.

Synchronous, in the main thread. On several ranks each has a learner, and every call is a collective: all of them are given
the same arguments, take their own shares of them, and return the same.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from services.config import LossConfig, RunConfig
from services.errors import DistillServeError
from services.models.adapters import has_adapter
from services.models.padding import PaddedSequences, cut_for_ranks, pad_sequences
from services.weight_transfer.source import CheckpointSource, WeightSource
from services.wire.batch import TrainingBatch
from trainer import learner_state
from trainer.batch import MicroBatch, loss_inputs, pack, pack_texts
from trainer.checkpoint.folder import Checkpoint
from trainer.high_entropy import highest_share
from trainer.learner_state import RankState
from trainer.lora import trained_parameters
from trainer.loss import (
    LossTotals,
    estimate_reverse_kl,
    language_model_loss,
    merge_metrics,
    minillm_loss,
)
from trainer.loss.head import HeadOutput
from trainer.own_optimizers import DEFAULT, OwnOptimizers
from trainer.parallel import delay_reduction, is_spread, keeps_gradients, local, measuring, whole
from trainer.ranks.group import Ranks
from trainer.student import Student
from trainer.weights.adapter_proof import AdapterProof
from trainer.weights.host_copy import HostCopy
from trainer.weights.snapshot import GivenTokens, StudentState, WeightSnapshot

logger = logging.getLogger(__name__)


class _BeforeUpdates(NamedTuple):
    """Of a micro-batch, as `loss_inputs` takes it."""

    reference_token_logprobs: torch.Tensor | None  # [N]
    policy_gradient_mask: torch.Tensor | None  # [N] bool


class Captured(NamedTuple):
    """A learner after a step, in copies that a later step does not change."""

    student: StudentState
    state: RankState


class Learner:
    """The student with its optimizer.

    Args:
        student: where it trains, see `trainer.parallel.place`.
        num_steps: of the run, for the schedule.
        ranks: this process among those that train.
        check: called where a step may be given up, which it is when this raises, on all ranks at the same place.
        reference: the frozen student that loss.alpha_reference_kl stays near to.
        optimizers: the same on every rank.

    Attributes:
        finished_step: the step whose updates the student holds.
    """

    def __init__(
        self,
        config: RunConfig,
        student: Student,
        num_steps: int,
        ranks: Ranks | None = None,
        check: Callable[[], None] = lambda: None,
        reference: Student | None = None,
        optimizers: OwnOptimizers = DEFAULT,
    ) -> None:
        assert (reference is not None) == (config.loss.alpha_reference_kl > 0), (
            "a reference is held where it is looked at"
        )
        self._reference = reference
        self.config, self.student, self.ranks, self._check = config, student, ranks or Ranks(), check
        self._share: dict[str, Any] = {"rank": self.ranks.index, "num_ranks": self.ranks.count}
        self._num_steps = num_steps
        self.optimizer, self.schedule = optimizers.build(student, student.model, config.optimizer, num_steps)
        self.finished_step = 0
        self._copy: HostCopy | None = None
        self._has_pushed = False
        self._skipped_in_a_row = 0
        self._remember()

    # ------------------------------------------------------------------------------------------ training

    def step(self, batch: TrainingBatch) -> dict[str, float]:
        """Update the student on one batch, `pipeline.updates_per_batch` times.

        Returns:
            metrics, means over the batch's trained tokens, of the first update, when the student still is the policy that
            sampled; of clipping, that of the last update. "loss" is without the texts' part, which is alpha_lm times
            "lm_loss". Only the counts when there is nothing to train on. "train_s" is the time of the call in seconds.
            "peak_memory_gib" is the most that a rank has held in the run.
            An update whose gradient is not finite is skipped, with those after it on this batch: the weights and the
            optimizer stay as they are, and "num_skipped_updates" counts it.

        Raises:
            DistillServeError: more than `optimizer.max_skipped_updates` in a row were not finite, or no GPU memory is left.
        """
        started = time.monotonic()
        try:
            with self._all_updates_or_none():
                metrics = self._update(batch)
        except torch.OutOfMemoryError as error:
            raise DistillServeError(
                f"no GPU memory is left in the step after {self.finished_step}: {str(error).splitlines()[0]} Lower "
                f"pipeline.tokens_per_micro_batch = {self.config.pipeline.micro_batch_tokens}, or see docs/scaling.md for what "
                "else a rank may hold less of"
            ) from error
        self.finished_step += 1
        self._remember()
        return metrics | {"train_s": time.monotonic() - started, "peak_memory_gib": self.ranks.peak_memory_gib()}

    def _remember(self) -> None:
        """What a step that is given up half-way changes, besides weights, as it is after the finished one."""
        self._after_step = (learner_state.generators(self.ranks), self._skipped_in_a_row)
        self._is_updating = False

    def _update(self, batch: TrainingBatch) -> dict[str, float]:
        config, switch = self.config, self.student.rope_switch
        rewards = config.reward if config.learns_rewards else None
        limit = config.pipeline.micro_batch_tokens
        micro_batches = pack(batch, config.loss, limit, switch, rewards=rewards, **self._share)
        longest = config.sampling.max_new_tokens
        totals = LossTotals.sum([LossTotals.of(m.loss_mask, m.cu_seqlens, longest) for m in micro_batches]).over_ranks()
        windows = batch.windows()
        text_batches = pack_texts(windows, limit, switch, **self._share)
        num_text_tokens = sum(len(window) - 1 for window in windows)
        learning_rate = self.schedule.get_last_lr()[0]
        if totals.num_valid_tokens == 0 and not windows:
            self._advance_schedule()
            return {"num_valid_tokens": 0.0}
        before = self._before_updates(micro_batches)
        # Log-probabilities before the first update: those of its own forward passes.
        old: list[torch.Tensor] | None = None
        updates: list[dict[str, float]] = []
        num_skipped = 0
        for _ in range(config.pipeline.updates_per_batch):
            metrics, of_update = self._backward(micro_batches, totals, old, before, texts_follow=bool(text_batches))
            old = of_update if old is None else old
            metrics |= self._backward_texts(text_batches, num_text_tokens)
            norm = self._apply()
            if not math.isfinite(norm):
                num_skipped = config.pipeline.updates_per_batch - len(updates)
                self._count_skipped(norm)
                break
            self._skipped_in_a_row = 0
            updates.append(metrics | {"grad_norm": norm})
        self._advance_schedule()
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
        trained = [p for p in self.student.parameters() if p.requires_grad]
        before = [local(p.detach()).to("cpu", copy=True) for p in trained]
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for parameter, value in zip(trained, before, strict=True):
                    local(parameter).copy_(value)
            raise

    def _before_updates(self, micro_batches: list[MicroBatch]) -> list[_BeforeUpdates]:
        """What the loss looks at of the policies before the first update on the batch, besides `old`."""
        loss = self.config.loss
        nothing: list[None] = [None] * len(micro_batches)
        references: Sequence[torch.Tensor | None] = nothing
        masks: Sequence[torch.Tensor | None] = nothing
        if self._reference is not None:
            references = [output.token_logprobs for output in self._measured(self._reference, micro_batches)]
        if loss.top_entropy_quantile < 1:
            entropies = [output.entropy for output in self._measured(self.student, micro_batches)]
            lowest = highest_share(entropies, loss.top_entropy_quantile, self.ranks)
            masks = [entropy >= lowest for entropy in entropies]
        return [_BeforeUpdates(*parts) for parts in zip(references, masks, strict=True)]

    def _measured(self, student: Student, micro_batches: list[MicroBatch]) -> Iterator[HeadOutput]:
        """Of each micro-batch what a student says of the sampled tokens, without gradient and dropout."""
        for micro_batch in micro_batches:
            self._check()
            batch = micro_batch.to(self.ranks.device)
            nothing = batch.token_ids.new_empty((len(batch.token_ids), 0))
            with measuring(student):
                yield self._forward(batch, nothing, self.config.loss.kd_temperature, student=student)

    def _backward(
        self,
        micro_batches: list[MicroBatch],
        totals: LossTotals,
        old: list[torch.Tensor] | None,
        before: list[_BeforeUpdates],
        *,
        texts_follow: bool,
    ) -> tuple[dict[str, float], list[torch.Tensor]]:
        """Accumulate the gradient of the whole batch.

        Args:
            old: [N] of each micro-batch, log q before the first update on this batch; None on that update.
            before: of each micro-batch, what else was known before that update.
            texts_follow: more is added to the gradient before it is used.

        Returns:
            metrics of all ranks, and [N] of each micro-batch, the log-probabilities of this pass.
        """
        collected, logprobs, total_loss = [], [], 0.0
        for index, micro_batch in enumerate(micro_batches):
            self._check()
            delay_reduction(self.student, index == len(micro_batches) - 1 and not texts_follow)
            batch = micro_batch.to(self.ranks.device)
            has_bonus = self.config.loss.alpha_entropy > 0
            output = self._forward(
                batch, batch.support_ids, self.config.loss.kd_temperature, entropy_gradient=has_bonus
            )
            inputs = loss_inputs(batch, output, None if old is None else old[index], *before[index])
            loss, metrics = minillm_loss(inputs, self.config.loss, totals)
            loss.backward()
            collected.append(metrics)
            logprobs.append(output.token_logprobs.detach())
            total_loss += float(loss.detach())  # micro-batch losses add up to the step's
        merged = {"num_valid_tokens": 0.0}
        if collected:
            merged = merge_metrics(collected, lambda rows: self.ranks.gather(rows).flatten(0, 1))
        return {"loss": self._sum(total_loss), **merged}, logprobs

    def _backward_texts(self, batches: list[PaddedSequences], num_tokens: int) -> dict[str, float]:
        """Accumulate the gradient of alpha_lm * L_PT; the cross-entropy per token as a metric where there are texts.

        Args:
            num_tokens: that are predicted, on all ranks.
        """
        if not batches:
            return {}
        total = 0.0
        for index, text_batch in enumerate(batches):
            self._check()
            delay_reduction(self.student, index == len(batches) - 1)
            batch = text_batch.to(self.ranks.device)
            nothing = batch.token_ids.new_empty((len(batch.token_ids), 0))
            loss = language_model_loss(self._forward(batch, nothing).token_logprobs, num_tokens)
            (self.config.loss.alpha_lm * loss).backward()
            total += float(loss.detach())
        return {"lm_loss": self._sum(total)}

    def _sum(self, number: float) -> float:
        """Over all ranks."""
        return float(self.ranks.gather(torch.tensor(number, dtype=torch.float64)).sum())

    def _apply(self) -> float:
        """Clip and step, unless the gradient's norm is not finite; returns the norm."""
        largest = self.config.optimizer.max_grad_norm
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.student.parameters(), largest)))
        if math.isfinite(norm):
            self._check()
            self._is_updating = True
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not keeps_gradients(self.student))
        return norm

    def _advance_schedule(self) -> None:
        """To the next step's learning rate, also after a first step that changed nothing, of which torch warns."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()

    def _count_skipped(self, norm: float) -> None:
        self._skipped_in_a_row += 1
        most = self.config.optimizer.max_skipped_updates
        if self._skipped_in_a_row > most:
            raise DistillServeError(
                f"the gradient norm is {norm}, and {most} updates before this one were skipped for that reason "
                "(optimizer.max_skipped_updates); lower optimizer.learning_rate or look at the data"
            )
        logger.warning("the gradient norm of step %d is %s: the update is skipped", self.finished_step + 1, norm)

    def _forward(
        self,
        batch: PaddedSequences,
        support_ids: torch.Tensor,
        temperature: float = 1.0,
        *,
        entropy_gradient: bool = False,
        student: Student | None = None,
    ) -> HeadOutput:
        ids = batch.input_ids, batch.positions, batch.token_ids, support_ids
        output: HeadOutput = (student or self.student)(*ids, temperature, batch.lengths, entropy_gradient)
        return output

    # ----------------------------------------------------------------------------------------- measuring

    def logprobs(self, given: GivenTokens) -> list[np.ndarray]:
        """Log-probabilities of the tokens of each completion, [T] float32, at temperature 1 and without dropout."""
        sequences, lengths = given.sequences, [len(completion) for completion in given.completions]
        limit, switch = self.config.pipeline.micro_batch_tokens, self.student.rope_switch
        # Each rank fills in its own completions.
        found = [torch.zeros(length) for length in lengths]
        with measuring(self.student):
            for group in cut_for_ranks([len(s) for s in sequences], limit, boundary=switch, **self._share):
                batch = pad_sequences(
                    [sequences[index] for index in group], [len(given.prompts[index]) for index in group]
                ).to(self.ranks.device)
                scored = self._forward(batch, batch.token_ids.unsqueeze(-1)).token_logprobs.float().cpu()
                for index, part in zip(group, scored.split([lengths[index] for index in group]), strict=True):
                    found[index] = part
        return [part.numpy() for part in self.ranks.gather(torch.cat(found)).sum(0).split(lengths)]

    def reverse_kl(self, batch: TrainingBatch) -> list[tuple[float, int]]:
        """For each completion, sampled at temperature 1: the reverse KL summed over its tokens, nats, and their number."""
        limit, switch = self.config.pipeline.micro_batch_tokens, self.student.rope_switch
        found = torch.zeros(len(batch), dtype=torch.float64)
        with measuring(self.student):
            for micro_batch in pack(batch, LossConfig(), limit, switch, **self._share):
                on_device = micro_batch.to(self.ranks.device)
                output = self._forward(on_device, on_device.support_ids)
                per_token = estimate_reverse_kl(loss_inputs(on_device, output)).double().cpu()
                parts = per_token.split(micro_batch.cu_seqlens.diff().tolist())
                for index, part in zip(micro_batch.samples.tolist(), parts, strict=True):
                    found[index] = part.sum()
        sums = self.ranks.gather(found).sum(0).tolist()
        return list(zip(sums, batch.completion_lengths.tolist(), strict=True))

    # ------------------------------------------------------------------------------------------- weights

    def snapshot(self, version: int, dtype: torch.dtype, canary: GivenTokens) -> WeightSnapshot:
        """The weights as they are to be sent, and what they say of the canary; valid until the next step.

        Args:
            dtype: of the rollout servers.
            canary: tokens that the servers score under the new weights.
        """
        logprobs = self.logprobs(canary)
        source: WeightSource = CheckpointSource(self.student.model, dtype)
        proof = AdapterProof(self.student.model, dtype) if has_adapter(self.student.model) else None
        if self.ranks.count > 1:
            source = self._copied(version, source)
        return WeightSnapshot(version, source, logprobs, proof)

    def _copied(self, version: int, source: WeightSource) -> WeightSource:
        """Gathered into host memory by rank 0; the others only take part in it."""
        if not self._has_pushed:
            self._copy, self._has_pushed = HostCopy.share(self.ranks, source.metadata()), True
        if self.ranks.index == 0:
            assert self._copy is not None, "rank 0 makes it"
            return self._copy.fill(version, iter(source))
        for _ in source:
            pass
        return source

    def state(self) -> StudentState:
        """The student as it is, to be saved; whole on rank 0, where it is on several."""
        if not is_spread(self.student) and not has_adapter(self.student.model):
            return StudentState(self.finished_step)
        return self._gathered(copies=False)

    def _gathered(self, *, copies: bool) -> StudentState:
        """The student in host memory of rank 0.

        Args:
            copies: of tensors that are there already as well, which a step would change.
        """
        model = self.student.model
        kept = self._on_first_rank(CheckpointSource(model, model.dtype), copies=copies)
        if not has_adapter(model):
            return StudentState(self.finished_step, kept)
        trained = ((name, whole(p.detach())) for name, p in trained_parameters(model).items())
        return StudentState(self.finished_step, kept, self._on_first_rank(trained, copies=copies))

    def _on_first_rank(self, tensors: Iterable[tuple[str, torch.Tensor]], *, copies: bool) -> dict[str, torch.Tensor]:
        """In host memory; gathered by all ranks, of which the others keep nothing."""
        kept = {}
        for name, tensor in tensors:
            if self.ranks.index == 0:
                kept[name] = tensor.to("cpu", copy=copies)
        return kept

    # ----------------------------------------------------------------------------------- going on later

    @property
    def can_be_captured(self) -> bool:
        """Whether all of it is as the last finished step has left it: not so in the middle of an update."""
        return not self._is_updating

    def capture(self, folder: Path) -> Captured:
        """What a checkpoint holds, in host memory: of the student all on rank 0, of the optimizer on each rank its part.

        Args:
            folder: of the checkpoint, into which the other ranks write their parts.

        Raises:
            ConfigError: the user's optimizer or schedule has a state that cannot be kept.
        """
        generators, skipped_in_a_row = self._after_step
        state = learner_state.capture(self.student, self.optimizer, self.schedule, self.ranks, generators)
        state.values["skipped_in_a_row"] = skipped_in_a_row
        return Captured(self._gathered(copies=True), state)

    def wait_for_parts(self, folder: Path) -> None:
        """Wait, in any thread, until the other ranks have written their parts of a checkpoint.

        Raises:
            OutputError: one cannot be written; names the rank.
            RankLostError: a rank is gone.
        """

    def rehearse_parts(self, folder: Path) -> None:
        """Have every other rank write an empty part of a checkpoint into a folder.

        Raises:
            OutputError: one cannot, because it does not see the folder, for example; names the rank.
            RankLostError: a rank is gone.
        """

    def check_capture(self) -> None:
        """Find out early whether `capture` can work; the optimizer's state is there after its first step.

        Raises:
            ConfigError: as of `capture`.
        """
        learner_state.describe(self.student, self.optimizer, self.schedule)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from what was captured; the student has been loaded from there.

        Raises:
            StartupError: it is of another student or optimizer.
        """
        files, values, step = checkpoint.rank_files(), checkpoint.state["learner"], checkpoint.step
        parts = (self.student, self.optimizer, self.schedule, self.ranks)
        learner_state.restore(*parts, files, values, is_longer=self._num_steps != checkpoint.state["num_steps"])
        learner_state.restore_generators(self.ranks, files, checkpoint.num_ranks, self.config.seed, step)
        self._skipped_in_a_row = values["skipped_in_a_row"]
        self.finished_step = step
        self._remember()

    def claims_copy(self) -> bool:
        """Whether this rank is to save what was pushed last: each machine's first one to ask."""
        return self._copy is not None and self._copy.claim()

    def last_pushed(self) -> StudentState:
        """Of the last version that was gathered to be pushed, in its dtype; step 0 where there is none."""
        latest = None if self._copy is None else self._copy.latest()
        return StudentState(0) if latest is None else StudentState(*latest)
