"""The output head as one autograd Function: log-probabilities of a few tokens without keeping [N, V] logits.

For each position it returns log q of the sampled token, of the K support tokens S, of everything outside S (the
tail), and the entropy. Positions go through in chunks; only hidden, weight, ids and two logsumexps are saved, and
backward recomputes the logits chunk by chunk (LOSS_SPEC section 6), so memory is one or two [C, V] buffers.

Logits are z = softcap(logit_scale * (h W^T + b)) / temperature. The matrix products have the dtype of the hidden
states, as in the model and in the rollout engine; everything after them is float32 (float64 for float64 hidden states).

Left out: gradients of the entropy, of temperature, scale and soft cap; second derivatives; sharded weights.

Shape legend: N positions (project only the trained ones), H hidden size, V vocabulary, K support tokens, C positions of
a chunk.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bound on C * V when the caller does not choose: 128 MiB of float32, enough to keep the matrix products efficient.
MAX_CHUNK_ELEMENTS = 2**25
HALF_DTYPES = (torch.bfloat16, torch.float16)


class HeadOutput(NamedTuple):
    """Log-probabilities of the student; float32, or float64 for float64 hidden states."""

    token_logprobs: Tensor
    """[N] log q(token_ids[t])."""
    support_logprobs: Tensor
    """[N, K] log q(support_ids[t, k]); -inf without gradient at pads."""
    tail_logprob: Tensor
    """[N] log of the probability outside S; -inf without gradient where S is the whole vocabulary."""
    entropy: Tensor
    """[N] entropy of q over the whole vocabulary, detached."""


class _Logits(NamedTuple):
    """How hidden states become logits; the part of the head that forward and backward share."""

    weight: Tensor  # [V, H] in the dtype of the hidden states
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None
    logit_scale: float

    def write(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Overwrite out[C, V] with the logits of hidden[C, H] and return it."""
        if hidden.dtype in HALF_DTYPES:
            out.copy_(hidden @ self.weight.t())
        else:
            torch.mm(hidden, self.weight.t(), out=out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.softcap is not None:
            return out.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return out.mul_(self.logit_scale / self.temperature) if self.logit_scale != self.temperature else out

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d (h W^T + b) as a function of the logits: a number, or [C, V] with a soft cap."""
        if self.softcap is None:
            return self.logit_scale / self.temperature
        tanh_squared = (logits * (self.temperature / self.softcap)).square_()
        return tanh_squared.neg_().add_(1.0).mul_(self.logit_scale / self.temperature)


class _Support(NamedTuple):
    """S of a chunk, in a form that scatter accepts.

    A pad becomes a second copy of a token of the same row, so that writing the same value twice is harmless; a row of
    pads only points at token 0 and must write back what was there.
    """

    ids: Tensor  # [C, K] in 0..V-1
    is_pad: Tensor  # [C, K]
    is_empty: Tensor  # [C, 1] no token in S

    @classmethod
    def of(cls, support_ids: Tensor) -> "_Support":
        largest = support_ids.amax(-1, keepdim=True)
        is_pad = support_ids < 0
        return cls(torch.where(is_pad, largest.clamp(min=0), support_ids), is_pad, largest < 0)

    def overwrite_(self, x: Tensor, values: Tensor | float) -> None:
        """Set x[c, v] for v in S of row c, leaving all else alone; x [C, V], values [C, K] agreeing on copies."""
        kept = x.gather(1, self.ids)
        x.scatter_(1, self.ids, torch.where(self.is_empty, kept, values))


def _chunks(num_positions: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(i, min(i + chunk_tokens, num_positions)) for i in range(0, num_positions, chunk_tokens))


class _SupportLogprobs(torch.autograd.Function):
    """(hidden, weight, bias) -> HeadOutput; the other arguments carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        support_ids: Tensor,
        options: tuple[float, float | None, float],
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_positions, dtype = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
        token, lse, lse_tail, entropy = torch.empty(4, num_positions, dtype=dtype, device=hidden.device).unbind()
        support = torch.empty(support_ids.shape, dtype=dtype, device=hidden.device)
        head = _Logits(weight.to(hidden.dtype), bias, *options)
        buffers = hidden.new_empty((2, min(chunk_tokens, num_positions), len(weight)), dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(num_positions, chunk_tokens):
                z, e = buffers[:, : rows.stop - rows.start].unbind()
                head.write(hidden[rows], z)
                chunk = _forward_chunk(z, e, token_ids[rows], _Support.of(support_ids[rows]))
                token[rows], support[rows], lse[rows], lse_tail[rows], entropy[rows] = chunk
        ctx.save_for_backward(hidden, weight, bias, token_ids, support_ids, lse, lse_tail)
        ctx.options, ctx.chunk_tokens = options, chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return token - lse, support - lse.unsqueeze(-1), lse_tail - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_token: Tensor, g_support: Tensor, g_tail: Tensor, _: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, token_ids, support_ids, lse, lse_tail = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head = _Logits(weight.to(hidden.dtype), bias, *ctx.options)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Float32 whatever the weight's dtype: thousands of chunk contributions would vanish in a bfloat16 sum.
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if needs_bias else None
        buffer = hidden.new_empty((min(ctx.chunk_tokens, len(hidden)), len(weight)), dtype=lse.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(hidden), ctx.chunk_tokens):
                z = head.write(hidden[rows], buffer[: rows.stop - rows.start])
                slope = head.slope(z)
                support = _Support.of(support_ids[rows])
                gradients = g_token[rows], g_support[rows], g_tail[rows]
                _backward_chunk(z, lse[rows], lse_tail[rows], token_ids[rows], support, gradients)
                z.mul_(slope)
                if d_bias is not None:
                    d_bias.add_(z.sum(0))
                dz = z.to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden[rows] = dz @ head.weight
                if d_weight is not None:
                    _add_product_(d_weight, dz.t(), hidden[rows])
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; the running sum stays float32 when a and b are half precision."""
    if a.dtype in HALF_DTYPES:
        total.add_(a @ b)
    else:
        total.addmm_(a, b)


def _forward_chunk(
    z: Tensor, e: Tensor, token_ids: Tensor, support: _Support
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logit of the token [C] and of S [C, K], logsumexp [C], logsumexp of the tail [C], entropy [C].

    z [C, V] holds the logits and e [C, V] anything; both are overwritten.
    """
    token = z.gather(1, token_ids.unsqueeze(-1)).squeeze(-1)
    in_support = z.gather(1, support.ids).masked_fill_(support.is_pad, -torch.inf)
    shift = z.amax(-1, keepdim=True)
    torch.exp(z.sub_(shift), out=e)
    sum_exp = e.sum(-1)
    log_sum = sum_exp.log()
    entropy = log_sum - e.mul_(z).sum(-1) / sum_exp

    # A logsumexp over the complement with its own maximum; log(1 - sum over S) has no correct digits for a small tail.
    support.overwrite_(z, -torch.inf)
    tail_shift = z.amax(-1, keepdim=True)
    # The maximum of an empty tail is -inf, and -inf - (-inf) would be NaN.
    tail_sum = z.sub_(tail_shift.masked_fill(tail_shift == -torch.inf, 0.0)).exp_().sum(-1)
    shift, tail_shift = shift.squeeze(-1), tail_shift.squeeze(-1)
    return token, in_support, shift + log_sum, shift + tail_shift + tail_sum.log(), entropy


def _backward_chunk(
    z: Tensor,
    lse: Tensor,
    lse_tail: Tensor,
    token_ids: Tensor,
    support: _Support,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Overwrite the logits z [C, V] with dz, their gradient, given those of token [C], support [C, K] and tail [C].

    dz_v = sum_k g_k 1[v = id_k] + g_y 1[v = y] - q_v G + 1[v not in S] g_tail exp(z_v - lse_tail), G the sum of all g.
    Outside S this is exp(z_v - lse_tail) (g_tail - q_tail G): one buffer, and no exponent is positive, however small
    the tail. Inside S that expression may overflow, or be NaN if the tail is empty, and is replaced.
    """
    g_token, g_support, g_tail = gradients
    g_support = g_support.masked_fill(support.is_pad, 0.0)
    g_tail = g_tail.masked_fill(lse_tail == -torch.inf, 0.0)
    g_sum = g_token + g_support.sum(-1) + g_tail
    inside = z.gather(1, support.ids).sub_(lse.unsqueeze(-1)).exp_().mul_(-g_sum.unsqueeze(-1))
    outside = g_tail - (lse_tail - lse).exp() * g_sum
    z.sub_(lse_tail.unsqueeze(-1)).exp_().mul_(outside.unsqueeze(-1))
    support.overwrite_(z, inside)
    z.scatter_add_(1, support.ids, g_support)
    z.scatter_add_(1, token_ids.unsqueeze(-1), g_token.unsqueeze(-1))


def support_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    support_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> HeadOutput:
    """Student log-probabilities of the sampled token, of the support and of the tail, with gradients.

    Args:
        hidden: [N, H] last hidden states, float64, float32, bfloat16 or float16; its dtype is that of the products.
        weight: [V, H] output embedding; may be tied to the input embedding. Its gradient is accumulated in float32.
        token_ids: [N] int64, the token sampled at each position, in 0..V-1.
        support_ids: [N, K] int64, distinct tokens of S in each row, -1 pads. K may be 0, or the whole vocabulary.
        bias: [V].
        temperature: divides the logits last (the student's half of kd_temperature).
        softcap: c of c * tanh(x / c), None for none (Gemma 2's final_logit_softcapping).
        logit_scale: multiplies h W^T + b first (Cohere's logit_scale).
        chunk_tokens: positions projected at a time; default: as many as keep a [C, V] buffer at MAX_CHUNK_ELEMENTS.
    """
    num_positions, num_support = support_ids.shape
    assert hidden.shape == (num_positions, weight.shape[1]), (hidden.shape, weight.shape, support_ids.shape)
    assert token_ids.shape == (num_positions,), (token_ids.shape, support_ids.shape)
    chunk_tokens = chunk_tokens or max(1, MAX_CHUNK_ELEMENTS // len(weight))
    if num_support == 0:  # one column of pads is the same S, and has a maximum
        support_ids = token_ids.new_full((num_positions, 1), -1)
    options = (temperature, softcap, logit_scale)
    token, support, tail, entropy = _SupportLogprobs.apply(
        hidden, weight, bias, token_ids, support_ids, options, chunk_tokens
    )
    return HeadOutput(token, support[:, :num_support], tail, entropy)
