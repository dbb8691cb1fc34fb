"""The MiniLLM loss as pure functions: tensors in, (loss, metrics) out.

    loss = policy-gradient term on the sequence's reverse KL  +  single-step reverse KL of the next-token distributions

MiniLLM (arXiv 2306.08543, eq. 2-7) with TRL's options gamma and length normalisation. Two special cases: gamma = 0
without the single-step term is Thinking Machines' on-policy distillation; the single-step term alone on the full
vocabulary is GKD's reverse KL on student samples (arXiv 2306.13649).

Left out: several updates on one batch (PPO clipping), rewards other than the teacher, divergences other than reverse
KL, cross-entropy on dataset text, and the temperature, which is applied where the logits are.

Shape legend: N completion positions, packed; B sequences, i owns cu_seqlens[i]:cu_seqlens[i+1]; K support tokens;
M trained positions (loss_mask = 1). Position t predicts token_ids[t] given everything before it; a micro-batch holds
whole sequences. Log-probabilities are natural, computed in float32, or float64 if given; ids are int64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from services.config import LossConfig


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """One micro-batch. What stands at masked positions and at pads is never read: it may be NaN or infinite.

    At trained positions everything is finite, except that a tail is -inf where the support is the whole vocabulary.
    """

    student_token_logprobs: Tensor  # [N] log q(token_ids[t]) of the live student, with gradient
    student_support_logprobs: Tensor  # [N, K] log q(support_ids[t, k]), with gradient
    student_tail_logprob: Tensor  # [N] log of q's mass outside the support, with gradient
    rollout_logprobs: Tensor  # [N] log b(token_ids[t]), as reported by the policy that sampled
    teacher_token_logprobs: Tensor  # [N] log p(token_ids[t])
    teacher_support_logprobs: Tensor  # [N, K] log p(support_ids[t, k])
    teacher_tail_logprob: Tensor  # [N] log of p's mass outside the support
    support_ids: Tensor  # [N, K] distinct tokens of the support, chosen without looking at token_ids; -1 pads
    token_ids: Tensor  # [N] sampled tokens
    loss_mask: Tensor  # [N] bool or 0/1, the token was sampled by the student and counts
    cu_seqlens: Tensor  # [B+1] sequence boundaries; the last is N
    old_token_logprobs: Tensor | None = None  # [N] log q at the start of the step; default: the student's, detached
    single_step_kl: Tensor | None = None  # [N] full-vocabulary KL with gradient, in place of the estimators from S
    student_entropies: Tensor | None = None  # [N] for the metrics only

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and name != "cu_seqlens":
                shape = self.support_ids.shape if "support" in name else self.support_ids.shape[:1]
                assert value.shape == shape, f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)}"


@dataclass(frozen=True)
class LossTotals:
    """Denominators of an optimizer step, counted over all its micro-batches and ranks before the first backward."""

    num_valid_tokens: int  # trained tokens
    num_sequences: int  # those with a trained token, so that a micro-batch that only fills up a rank changes nothing
    max_completion_length: int | None = None  # longest possible completion, tokens; for the "constant" aggregation

    @classmethod
    def of(cls, loss_mask: Tensor, cu_seqlens: Tensor, max_completion_length: int | None = None) -> "LossTotals":
        """Count loss_mask [N] of the sequences cu_seqlens [B+1]."""
        per_sequence = _tokens_per_sequence(loss_mask.bool(), cu_seqlens)
        return cls(int(per_sequence.sum()), int((per_sequence > 0).sum()), max_completion_length)

    @classmethod
    def sum(cls, parts: Sequence["LossTotals"]) -> "LossTotals":
        """Add up micro-batches, or ranks.

        Raises:
            ValueError: they disagree on max_completion_length.
        """
        lengths = {part.max_completion_length for part in parts}
        if len(lengths) > 1:
            raise ValueError(f"max_completion_length differs within one step: {lengths}; give all parts the same")
        return cls(sum(p.num_valid_tokens for p in parts), sum(p.num_sequences for p in parts), *lengths)


class _Importance(NamedTuple):
    """w_t = q_old / b: staleness and the numerical mismatch of the two engines together."""

    ratio: Tensor  # [N] w_t
    weight: Tensor  # [N] f(w_t)
    is_capped: Tensor  # [N] bool, capped ("tis") or dropped ("icepop")


def minillm_loss(
    inputs: LossInputs, config: LossConfig, totals: LossTotals | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch, scaled so that the losses of all micro-batches of a step sum to the step's loss.

    Args:
        inputs: the micro-batch.
        config: weights and estimators, named as in the run file.
        totals: denominators of the optimizer step; default: this micro-batch is the step. Where ranks average their
            gradients, multiply the loss by their number.

    Returns:
        The scalar loss, a zero connected to the graph if no token is trained, and the metrics of the micro-batch, to
        be combined by `merge_metrics`. The loss is a surrogate: its gradient is meant, its value is no divergence.
    """
    x = _without_masked(inputs)
    totals = LossTotals.of(x.loss_mask, x.cu_seqlens) if totals is None else totals
    importance = _importance(x, config)
    advantages, is_clipped = _advantages(x, config)
    single_step, single_step_kl = _single_step(x, importance.weight, config)

    terms = []
    if config.rkl_advantage:
        terms.append(-(importance.weight * advantages) * x.student_token_logprobs)
    if config.single_step_decomposition:
        terms.append(config.alpha_single_step * single_step)
    loss = (torch.stack(terms).sum(0) * _token_weights(x, config, totals)).sum()
    return loss, _metrics(x, importance, advantages, is_clipped, single_step_kl)


def is_exclusive(config: LossConfig) -> bool:
    """Whether a token's own reward is left to the single-step term (MiniLLM's decomposition, eq. 4)."""
    return config.reward_to_go == "exclusive" or (config.reward_to_go == "auto" and config.single_step_decomposition)


@torch.no_grad()
def reward_to_go(
    rewards: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    length_normalization: bool,
    exclusive: bool,
) -> Tensor:
    """Discounted sum of the rewards of the trained tokens from t on, within t's sequence.

    Inclusive: sum_j gamma^j r_{t+j}, over sum_j gamma^j with length normalisation (MiniLLM's R^Norm, eq. 6, at
    gamma = 1), j counting trained tokens only. Exclusive: gamma times the inclusive value at the next trained token.

    Args:
        rewards: [N].
        loss_mask: [N]; masked positions are skipped, do not age the discount, and are 0 in the result.
        cu_seqlens: [B+1].

    Returns:
        [N] detached, float32, or float64 for float64 rewards.
    """
    trained = loss_mask.bool().nonzero().squeeze(-1)
    sequence_ids = _sequence_ids(cu_seqlens, len(rewards))[trained]
    kept = rewards.to(torch.promote_types(rewards.dtype, torch.float32))[trained]
    returns = _discounted_suffix_sum(kept, sequence_ids, gamma)
    if length_normalization:
        returns = returns / _discounted_suffix_sum(torch.ones_like(kept), sequence_ids, gamma)
    if exclusive:
        has_next = sequence_ids[1:] == sequence_ids[:-1]
        later = torch.where(has_next, gamma * returns[1:], 0.0)
        returns = torch.cat([later, torch.zeros_like(returns[:1])])
    return kept.new_zeros(len(rewards)).index_copy_(0, trained, returns)


def _discounted_suffix_sum(values: Tensor, sequence_ids: Tensor, gamma: float) -> Tensor:
    """sum_j gamma^j values[t+j] within each sequence, [M], in log2(M) doublings instead of M steps.

    After a round with distance d each entry covers the next 2d tokens (Hillis and Steele's scan).
    """
    total = values.clone()
    distance, decay = 1, gamma
    while distance < len(values) and decay > 0:
        same = sequence_ids[distance:] == sequence_ids[:-distance]
        total[:-distance] += torch.where(same, decay * total[distance:], 0.0)
        distance, decay = 2 * distance, decay * decay
    return total


def _sequence_ids(cu_seqlens: Tensor, num_positions: int) -> Tensor:
    """[N] index of the sequence that owns each position."""
    lengths = cu_seqlens.diff()
    ids = torch.arange(len(lengths), device=cu_seqlens.device)
    return torch.repeat_interleave(ids, lengths, output_size=num_positions)


def _tokens_per_sequence(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[B] trained tokens of each sequence, int64."""
    ids = _sequence_ids(cu_seqlens, len(mask))
    return ids.new_zeros(len(cu_seqlens) - 1).index_add_(0, ids, mask.long())


def _without_masked(inputs: LossInputs) -> LossInputs:
    """Put 0 where nothing may be read, before any arithmetic: NaN times a zero mask would be NaN, and so its gradient.

    With a 0 for both policies their log ratio is 0, so such entries drop out of every term.
    """
    mask = inputs.loss_mask.bool()
    has_tail = mask & (inputs.student_tail_logprob > -torch.inf)
    in_support = mask.unsqueeze(-1) & (inputs.support_ids >= 0)
    values = {**vars(inputs), "loss_mask": mask, "support_ids": inputs.support_ids.masked_fill(~in_support, -1)}
    old = inputs.student_token_logprobs if inputs.old_token_logprobs is None else inputs.old_token_logprobs
    values["old_token_logprobs"] = old.detach()
    for name, value in values.items():
        if value is not None and value.is_floating_point():
            where = in_support if "support" in name else has_tail if "tail" in name else mask
            values[name] = torch.where(where, value.to(torch.promote_types(value.dtype, torch.float32)), 0.0)
    return LossInputs(**values)


def _importance(x: LossInputs, config: LossConfig) -> _Importance:
    assert x.old_token_logprobs is not None
    ratio = (x.old_token_logprobs - x.rollout_logprobs).exp()
    if config.importance_sampling == "tis":
        return _Importance(ratio, ratio.clamp(max=config.importance_cap), ratio > config.importance_cap)
    if config.importance_sampling == "icepop":
        is_dropped = (ratio < config.icepop_low) | (ratio > config.icepop_high)
        return _Importance(ratio, ratio.masked_fill(is_dropped, 0.0), is_dropped)
    return _Importance(ratio, torch.ones_like(ratio), torch.zeros_like(x.loss_mask))


def _advantages(x: LossInputs, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Advantages [N], detached, and which of them advantage_clip has changed [N].

    The reward is log p - log q of the *current* student; with the rollout policy's log-probability in place of q the
    expected gradient would gain a term that pushes q away from the rollout policy.
    """
    rewards = (x.teacher_token_logprobs - x.student_token_logprobs).detach()
    returns = reward_to_go(
        rewards, x.loss_mask, x.cu_seqlens, config.gamma, config.length_normalization, is_exclusive(config)
    )
    advantages = returns * (config.alpha_rkl if config.rkl_advantage else 0.0)
    if config.advantage_clip is None:
        return advantages, torch.zeros_like(x.loss_mask)
    return advantages.clamp(-config.advantage_clip, config.advantage_clip), advantages.abs() > config.advantage_clip


def _single_step(x: LossInputs, weight: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Single-step loss [N] with gradient, and the estimate [N] of the reverse KL whose gradient it has, detached."""
    if x.single_step_kl is not None:
        return x.single_step_kl, x.single_step_kl.detach()
    kl = _bucketed_reverse_kl(x)
    if config.single_step_estimator == "truncated":
        return kl, kl.detach()
    correction = _tail_correction(x, weight)
    return kl - correction * x.student_token_logprobs, kl.detach() - correction


def _bucketed_reverse_kl(x: LossInputs) -> Tensor:
    """[N] K_S = sum_{i in S} q_i log(q_i / p_i) + q_tail log(q_tail / p_tail), a lower bound of the reverse KL.

    Without the tail bucket it would be minimised by moving mass off S.
    """
    inside = x.student_support_logprobs.exp() * (x.student_support_logprobs - x.teacher_support_logprobs)
    tail = x.student_tail_logprob.exp() * (x.student_tail_logprob - x.teacher_tail_logprob)
    return inside.sum(-1) + tail


@torch.no_grad()
def _tail_correction(x: LossInputs, weight: Tensor) -> Tensor:
    """[N] f(w_t) rho_t delta_t on sampled tokens outside S, else 0.

    -correction * log q(y_t) supplies, in expectation over y_t, the gradient inside the tail that K_S lacks, provided
    that S does not depend on y_t; delta_t is what remains of the log ratio p/q once the tail's own is taken out.
    """
    assert x.old_token_logprobs is not None
    rho = (x.student_token_logprobs - x.old_token_logprobs).exp()
    token_ratio = x.teacher_token_logprobs - x.student_token_logprobs
    delta = token_ratio - (x.teacher_tail_logprob - x.student_tail_logprob)
    return torch.where(x.loss_mask & ~_in_support(x), weight * rho * delta, 0.0)


def _in_support(x: LossInputs) -> Tensor:
    """[N] bool, whether the sampled token is in S."""
    return (x.support_ids == x.token_ids.unsqueeze(-1)).any(-1)


def _token_weights(x: LossInputs, config: LossConfig, totals: LossTotals) -> Tensor | float:
    """Factor of each token's loss, [N] or one number; "sequence_sum" and "constant" are proportional to the gradient of
    the sequence-level reverse KL, the other two reweigh tokens by length.
    """
    num_sequences = max(1, totals.num_sequences)
    match config.aggregation:
        case "token_mean":
            return 1.0 / max(1, totals.num_valid_tokens)
        case "sequence_sum":
            return 1.0 / num_sequences
        case "sequence_mean":
            lengths = _tokens_per_sequence(x.loss_mask, x.cu_seqlens).clamp(min=1)
            return (lengths.to(x.student_token_logprobs.dtype) * num_sequences).reciprocal()[
                _sequence_ids(x.cu_seqlens, len(x.loss_mask))
            ]
        case "constant":
            if totals.max_completion_length is None:
                raise ValueError(
                    'loss.aggregation = "constant" got totals.max_completion_length = None; pass '
                    "LossTotals.of(..., max_completion_length=sampling.max_new_tokens)"
                )
            return 1.0 / (num_sequences * totals.max_completion_length)


@torch.no_grad()
def _metrics(
    x: LossInputs, importance: _Importance, advantages: Tensor, is_clipped: Tensor, single_step_kl: Tensor
) -> dict[str, Tensor]:
    """Scalar tensors, float64: "sum/NAME" over trained tokens, "max/NAME", and counts "num_NAME"."""
    log_ratio = x.teacher_token_logprobs - x.student_token_logprobs
    is_token = x.support_ids >= 0
    per_token = {
        "reverse_kl_k1": -log_ratio,
        "reverse_kl_k3": log_ratio.double().expm1() - log_ratio,
        "single_step_kl": single_step_kl,
        "teacher_support_mass": torch.where(is_token, x.teacher_support_logprobs.exp(), 0.0).sum(-1),
        "student_support_mass": torch.where(is_token, x.student_support_logprobs.exp(), 0.0).sum(-1),
        "sampled_in_support_fraction": _in_support(x),
        "importance_ratio_mean": importance.ratio,
        "importance_ratio_capped_fraction": importance.is_capped,
        # k3 estimate of KL(b || q_old): unlike the mean of log b - log q_old it is never negative and has little noise.
        "rollout_mismatch_kl": importance.ratio - 1.0 - importance.ratio.log(),
        "advantage_mean": advantages,
        "advantage_square": advantages.double().square(),
        "advantage_clipped_fraction": is_clipped,
    }
    if x.student_entropies is not None:
        per_token["student_entropy"] = x.student_entropies
    stacked = torch.stack([value.double() for value in per_token.values()])
    sums = torch.where(x.loss_mask, stacked, 0.0).sum(-1)
    metrics = {f"sum/{name}": total for name, total in zip(per_token, sums, strict=True)}
    ratios = torch.where(x.loss_mask, importance.ratio.double(), 0.0)
    metrics["max/importance_ratio_max"] = torch.cat([ratios, ratios.new_zeros(1)]).amax()
    per_sequence = _tokens_per_sequence(x.loss_mask, x.cu_seqlens)
    metrics["num_valid_tokens"] = per_sequence.sum().double()
    metrics["num_sequences"] = (per_sequence > 0).sum().double()
    return metrics


def merge_metrics(micro_batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Combine the metrics of the micro-batches (of all ranks) of a step into means over its trained tokens.

    Sums are divided by the step's trained tokens, maxima and counts keep their meaning, and advantage_std is derived.
    Means are NaN if no token was trained.
    """
    names = list(micro_batches[0])
    columns = zip(*(torch.stack([batch[name] for name in names]).tolist() for batch in micro_batches), strict=True)
    values = dict(zip(names, columns, strict=True))
    num_tokens = sum(values["num_valid_tokens"])
    merged = {}
    for name, column in values.items():
        kind, _, short = name.rpartition("/")
        merged[short] = max(column) if kind == "max" else math.fsum(column)
        if kind == "sum":
            merged[short] = merged[short] / num_tokens if num_tokens else math.nan
    variance = merged.pop("advantage_square") - merged["advantage_mean"] ** 2
    merged["advantage_std"] = math.sqrt(max(variance, 0.0)) if num_tokens else math.nan
    return merged
