"""The MiniLLM loss as pure functions: tensors in, (loss, metrics) out.

    loss = policy-gradient term on the sequence's reverse KL and on rewards  +  single-step divergence of the next-token
           distributions  +  KL to a reference  -  entropy bonus

MiniLLM (arXiv 2306.08543, eq. 2-7) with TRL's options gamma and length normalisation. Two special cases: gamma = 0
without the single-step term is Thinking Machines' on-policy distillation; the single-step term alone on the full
vocabulary is GKD's loss on student samples (arXiv 2306.13649). Options and formulas: docs/losses.md.

The parts, a file each: advantages.py (rewards to advantages), importance.py (from the policy that sampled to the one
that learns), divergences.py (the single-step term from a few log-probabilities), aggregation.py (denominators over
micro-batches and ranks), metrics.py (sums of a micro-batch to means of a step). The temperature is applied where the
logits are (head.py and the teacher).

Shape legend: N completion positions, packed; B sequences, i owns cu_seqlens[i]:cu_seqlens[i+1]; K support tokens.
Position t predicts token_ids[t] given everything before it; a micro-batch holds whole sequences. Log-probabilities are
natural, computed in float32, or float64 if given; ids are int64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.config import LossConfig
from trainer.loss.advantages import token_advantages
from trainer.loss.aggregation import LossTotals, token_weights, tokens_per_sequence
from trainer.loss.divergences import bucketed, single_step_divergence, tail_correction
from trainer.loss.importance import Importance, importance_weights, policy_gradient, policy_ratio
from trainer.loss.metrics import LossMetrics
from trainer.loss.reference import reference_kl

_OF_SUPPORT = ("student_support_logprobs", "teacher_support_logprobs", "support_ids")
_OF_TAIL = ("student_tail_logprob", "teacher_tail_logprob")
_OF_SEQUENCE = ("external_advantages",)


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
    old_token_logprobs: Tensor | None = None  # [N] log q before the first update on this batch; None: this is the first
    external_advantages: Tensor | None = None  # [B] of rewards besides the teacher, see `reward_advantages`
    single_step_kl: Tensor | None = None  # [N] full-vocabulary divergence with gradient, in place of the estimators
    student_entropies: Tensor | None = None  # [N] for the metrics, and with gradient for an entropy bonus
    reference_token_logprobs: Tensor | None = None  # [N] log-probability of token_ids[t] under the frozen reference
    policy_gradient_mask: Tensor | None = None  # [N] bool, what the policy gradient looks at; None: all

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None or name == "cu_seqlens":
                continue
            expected = self.support_ids.shape if name in _OF_SUPPORT else self.support_ids.shape[:1]
            if name in _OF_SEQUENCE:
                expected = self.cu_seqlens[1:].shape
            assert value.shape == expected, f"{name} has shape {tuple(value.shape)}, expected {tuple(expected)}"


def minillm_loss(
    inputs: LossInputs, config: LossConfig, totals: LossTotals | None = None
) -> tuple[Tensor, LossMetrics]:
    """Loss of one micro-batch, scaled so that the losses of all micro-batches of a step sum to the step's loss.

    Args:
        inputs: the micro-batch.
        config: weights and estimators, named as in the run file.
        totals: denominators of the optimizer step; default: this micro-batch is the step. Where ranks average their
            gradients, multiply the loss by their number.

    Returns:
        The scalar loss, a zero connected to the graph if no token is trained, and the metrics of the micro-batch, to
        be combined by `merge_metrics`. The loss is a surrogate: its gradient is meant, its value is no divergence.

    Raises:
        ValueError: an option needs an input that is missing.
    """
    if config.single_step_estimator == "full" and inputs.single_step_kl is None:
        _check_whole_vocabulary(inputs)
    x = _without_masked(inputs)
    totals = LossTotals.of(x.loss_mask, x.cu_seqlens) if totals is None else totals
    old = x.student_token_logprobs.detach() if x.old_token_logprobs is None else x.old_token_logprobs
    importance = importance_weights(old, x.rollout_logprobs, config)
    rewards = (x.teacher_token_logprobs - x.student_token_logprobs).detach()
    advantages, is_clipped = token_advantages(rewards, x.external_advantages, x.loss_mask, x.cu_seqlens, config)
    per_token, is_ratio_clipped = policy_gradient(
        x.student_token_logprobs, x.old_token_logprobs, importance.weight, advantages, config
    )
    if x.policy_gradient_mask is not None:
        per_token = torch.where(x.policy_gradient_mask, per_token, 0.0)
    rho = policy_ratio(x.student_token_logprobs.detach(), old)
    single_step, single_step_kl = _single_step(x, importance.weight * rho, config)
    if config.uses_single_step:
        per_token = per_token + config.alpha_single_step * single_step
    per_token, of_regularizers = _regularized(per_token, x, config)
    weights = token_weights(x.loss_mask, x.cu_seqlens, config, totals, per_token.dtype)
    of_loss = {
        "single_step_kl": single_step_kl,
        "advantage_clipped_fraction": is_clipped,
        "policy_ratio_clipped_fraction": is_ratio_clipped,
    }
    metrics = LossMetrics.of(
        of_loss | of_regularizers | _policy_metrics(x, importance),
        advantages,
        importance.ratio,
        x.loss_mask,
        x.cu_seqlens,
    )
    return (per_token * weights).sum(), metrics


def _regularized(per_token: Tensor, x: LossInputs, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The token losses with the KL to the reference and the entropy bonus, and what the metrics say of them."""
    metrics = {}
    if config.alpha_reference_kl > 0:
        assert x.reference_token_logprobs is not None, "loss.alpha_reference_kl needs reference_token_logprobs"
        kl = reference_kl(x.student_token_logprobs, x.reference_token_logprobs)
        per_token, metrics = per_token + config.alpha_reference_kl * kl, {"reference_kl": kl.detach()}
    if config.alpha_entropy > 0:
        assert x.student_entropies is not None, "loss.alpha_entropy needs student_entropies"
        per_token = per_token - config.alpha_entropy * x.student_entropies
    return per_token, metrics


def language_model_loss(token_logprobs: Tensor, num_tokens: int) -> Tensor:
    """L_PT of MiniLLM (section 2.2): cross-entropy on dataset text, with a denominator of its own.

    Args:
        token_logprobs: [N] log q of the dataset's tokens, with gradient.
        num_tokens: of all micro-batches and ranks of the step.
    """
    return -token_logprobs.sum() / max(1, num_tokens)


@torch.no_grad()
def estimate_reverse_kl(inputs: LossInputs) -> Tensor:
    """[N] the hybrid estimate of KL(student || teacher) at each position: exact inside the support, and in expectation
    over tokens sampled from the student, at temperature 1 and without looking at the support, outside of it; nats."""
    x = _without_masked(inputs)
    return _single_step(x, torch.ones_like(x.student_token_logprobs), LossConfig())[1]


def _without_masked(inputs: LossInputs) -> LossInputs:
    """Put 0 where nothing may be read, before any arithmetic: NaN times a zero mask would be NaN, and so its gradient.

    With a 0 for both policies their log ratio is 0, so such entries drop out of every term.
    """
    mask = inputs.loss_mask.bool()
    has_tail = mask & (inputs.student_tail_logprob != -torch.inf)
    in_support = mask.unsqueeze(-1) & (inputs.support_ids >= 0)
    values = {**vars(inputs), "loss_mask": mask, "support_ids": inputs.support_ids.masked_fill(~in_support, -1)}
    if inputs.old_token_logprobs is not None:
        values["old_token_logprobs"] = inputs.old_token_logprobs.detach()
    for name, value in values.items():
        if value is None or not value.is_floating_point():
            continue
        where = in_support if name in _OF_SUPPORT else has_tail if name in _OF_TAIL else mask
        if name in _OF_SEQUENCE:
            where = tokens_per_sequence(mask, inputs.cu_seqlens) > 0
        values[name] = torch.where(where, value.to(torch.promote_types(value.dtype, torch.float32)), 0.0)
    return LossInputs(**values)


def _single_step(x: LossInputs, weight: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Single-step loss [N] with gradient, and the estimate [N] of the divergence whose gradient it has, detached.

    Args:
        weight: [N] f(w_t) rho_t; of the score-function term alone: over the next token the buckets are exact, and a
            weight of expectation one would only add noise.
    """
    if x.single_step_kl is not None:
        return x.single_step_kl, x.single_step_kl.detach()
    divergence = single_step_divergence(config)
    value = bucketed(
        divergence,
        (x.student_support_logprobs, x.student_tail_logprob),
        (x.teacher_support_logprobs, x.teacher_tail_logprob),
    )
    if config.single_step_estimator != "hybrid":
        return value, value.detach()
    lacking = tail_correction(
        divergence,
        x.student_token_logprobs - x.teacher_token_logprobs,
        x.student_tail_logprob - x.teacher_tail_logprob,
    )
    # A weight of 0, of a dropped token, must win against an infinite factor; masked tokens have no support to be in.
    counts = x.loss_mask & ~_in_support(x) & (weight != 0)
    factor, rest = (torch.where(counts, weight * part, 0.0) for part in lacking)
    return value + factor * x.student_token_logprobs, value.detach() + rest


def _check_whole_vocabulary(inputs: LossInputs) -> None:
    if bool((inputs.student_tail_logprob[inputs.loss_mask.bool()] != -torch.inf).any()):
        raise ValueError(
            'loss.single_step_estimator = "full" got a support that is not the whole vocabulary; pass single_step_kl, '
            'or every token in support_ids, or use "hybrid"'
        )


def _in_support(x: LossInputs) -> Tensor:
    """[N] bool, whether the sampled token is in S."""
    return (x.support_ids == x.token_ids.unsqueeze(-1)).any(-1)


@torch.no_grad()
def _policy_metrics(x: LossInputs, importance: Importance) -> dict[str, Tensor]:
    """[N] each: how far student, teacher and rollout policy are apart."""
    log_ratio = x.teacher_token_logprobs - x.student_token_logprobs
    is_token = x.support_ids >= 0
    metrics = {
        "reverse_kl_k1": -log_ratio,
        "reverse_kl_k3": log_ratio.double().expm1() - log_ratio,
        "teacher_support_mass": torch.where(is_token, x.teacher_support_logprobs.exp(), 0.0).sum(-1),
        "student_support_mass": torch.where(is_token, x.student_support_logprobs.exp(), 0.0).sum(-1),
        "sampled_in_support_fraction": _in_support(x),
        "importance_ratio_mean": importance.ratio,
        "importance_ratio_capped_fraction": importance.is_capped,
        # k3 estimate of KL(b || q_old): unlike the mean of log b - log q_old it is never negative and has little noise.
        "rollout_mismatch_kl": importance.ratio.double() - 1.0 - importance.log_ratio,
    }
    return metrics if x.student_entropies is None else {**metrics, "student_entropy": x.student_entropies}
