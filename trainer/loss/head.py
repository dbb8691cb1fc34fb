"""The output head as one autograd Function: log-probabilities of a few tokens without keeping [N, V] logits.

For each position it returns log q of the sampled token, of the K support tokens S, of everything outside S (the
tail), and the entropy. Positions go through in chunks, and a chunk in tiles of the vocabulary, small enough for a
processor's cache; only hidden, weight, ids and two logsumexps are saved, and backward recomputes the logits tile by
tile, so memory is one or two [C, T] buffers.

Logits are z = softcap(logit_scale * (h W^T + b)) / temperature, in float32 (float64 for float64 hidden states) whatever the
dtype of h and W: products of bfloat16 numbers are exact in it. On a GPU its tensor cores make them, ten times as fast as
products of float32 numbers; there the gradient of the logits is rounded to h's dtype, as that of every layer below is.

The entropy carries a gradient where it is asked for (an entropy bonus), which takes two more buffers in backward.

Left out: gradients of temperature, scale and soft cap; second derivatives; products with a shard of the weight (a sharded
weight is gathered).

Shape legend: N positions (project only the trained ones), H hidden size, V vocabulary, K support tokens, C positions of
a chunk, T columns of a tile.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Positions of a chunk when the caller does not choose: enough that reading the weight is not what takes the time.
CHUNK_TOKENS, GPU_CHUNK_TOKENS = 1024, 4096
# Bound on C * T: 32 MiB of float32, near the size of a processor's cache; on a GPU 256 MiB, for there the launching of some
# forty kernels a tile is what would take the time.
MAX_TILE_ELEMENTS, GPU_TILE_ELEMENTS = 2**23, 2**26
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
    """[N] entropy of q over the whole vocabulary; detached unless its gradient was asked for."""


class _Logits(NamedTuple):
    """How hidden states become logits; the part of the head that forward and backward share."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None
    logit_scale: float

    def write(self, hidden: Tensor, tile: slice, out: Tensor) -> None:
        """Overwrite out[C, T] with the logits that hidden[C, H] gives to the tokens of the tile."""
        _product(hidden, self.weight[tile].t(), out)
        if self.bias is not None:
            out.add_(self.bias[tile])
        if self.softcap is not None:
            out.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.logit_scale != self.temperature:
            out.mul_(self.scale)

    @property
    def scale(self) -> float:
        """d logits / d (h W^T + b), but for the soft cap."""
        return self.logit_scale / self.temperature

    def softcap_slope(self, logits: Tensor) -> Tensor | None:
        """The soft cap's factor of d logits / d (h W^T + b) as a function of the logits [C, T]."""
        if self.softcap is None:
            return None
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1.0)


class _TileIds(NamedTuple):
    """Token ids of a chunk as columns of a tile, in a form that gather and scatter accept.

    An id outside the tile (a pad, or a token of another tile) becomes a second copy of a token of the same row, so that
    writing the same value twice is harmless. A row of which no id is in the tile points at column 0, and must write back
    what was there.
    """

    columns: Tensor  # [C, K] in 0..T-1
    is_outside: Tensor  # [C, K]
    is_empty: Tensor  # [C, 1] no id of the row is in the tile

    @classmethod
    def of(cls, ids: Tensor, tile: slice) -> "_TileIds":
        columns = torch.where(ids < tile.stop, ids - tile.start, -1)
        largest = columns.amax(-1, keepdim=True)
        is_outside = columns < 0
        return cls(torch.where(is_outside, largest.clamp(min=0), columns), is_outside, largest < 0)

    def read(self, x: Tensor) -> Tensor:
        """x[c, column] of x [C, T]; -inf outside the tile."""
        return x.gather(1, self.columns).masked_fill_(self.is_outside, -torch.inf)

    def overwrite_(self, x: Tensor, values: Tensor | float) -> None:
        """Set x[c, column] of x [C, T], leaving all else alone; values [C, K] agreeing on copies."""
        kept = x.gather(1, self.columns)
        x.scatter_(1, self.columns, torch.where(self.is_empty, kept, values))

    def add_(self, x: Tensor, values: Tensor) -> None:
        """Add values [C, K] to x[c, column] of x [C, T]; those outside the tile are left out."""
        x.scatter_add_(1, self.columns, values.masked_fill(self.is_outside, 0.0))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, length)) for i in range(0, length, step))


class _Tiling(NamedTuple):
    """How [N, V] is cut: chunks of C positions, each of them into tiles of T columns."""

    shape: tuple[int, int]  # C, T
    chunks: list[slice]
    tiles: list[slice]

    @classmethod
    def of(cls, hidden: Tensor, vocabulary: int, chunk_tokens: int | None) -> "_Tiling":
        on_gpu, num_positions = hidden.device.type == "cuda", len(hidden)
        rows = max(1, min(chunk_tokens or (GPU_CHUNK_TOKENS if on_gpu else CHUNK_TOKENS), num_positions))
        elements = GPU_TILE_ELEMENTS if on_gpu else MAX_TILE_ELEMENTS
        columns = min(vocabulary, max(64, elements // rows // 64 * 64))  # of 64: products of aligned matrices
        return cls((rows, columns), list(_slices(num_positions, rows)), list(_slices(vocabulary, columns)))


class _SupportLogprobs(torch.autograd.Function):
    """(hidden, weight, bias) -> HeadOutput; the other arguments carry no gradient. token_ids are [N, 1] here."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        support_ids: Tensor,
        options: tuple[float, float | None, float],
        chunk_tokens: int | None,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_positions, dtype = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
        lse, lse_tail, entropy = torch.empty(3, num_positions, dtype=dtype, device=hidden.device).unbind()
        # Each id lies in one tile; in the others it reads as -inf.
        token = torch.full((num_positions, 1), -torch.inf, dtype=dtype, device=hidden.device)
        support = torch.full(support_ids.shape, -torch.inf, dtype=dtype, device=hidden.device)
        head = _Logits(weight, bias, *options)
        tiling = _Tiling.of(hidden, len(weight), chunk_tokens)
        buffers = hidden.new_empty((2, *tiling.shape), dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiling.chunks:
                tails = []
                for tile in tiling.tiles:
                    z, e = buffers[:, : rows.stop - rows.start, : tile.stop - tile.start].unbind()
                    head.write(hidden[rows], tile, z)
                    in_support = _TileIds.of(support_ids[rows], tile)
                    for logits, ids in ((token, _TileIds.of(token_ids[rows], tile)), (support, in_support)):
                        torch.maximum(logits[rows], ids.read(z), out=logits[rows])
                    tails.append(_tail_of_tile(z, e, in_support))
                lse[rows], lse_tail[rows], entropy[rows] = _join_tails(support[rows], tails)
        kept = entropy if entropy_gradient else None
        ctx.save_for_backward(hidden, weight, bias, token_ids, support_ids, lse, lse_tail, kept)
        ctx.options, ctx.chunk_tokens = options, chunk_tokens
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return token.squeeze(-1) - lse, support - lse.unsqueeze(-1), lse_tail - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_token: Tensor, g_support: Tensor, g_tail: Tensor, g_entropy: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, token_ids, support_ids, lse, lse_tail, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head = _Logits(weight, bias, *ctx.options)
        # Float32 whatever the dtype: thousands of contributions would vanish in a bfloat16 sum.
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if needs_bias else None
        gradients = _RowGradients.of(
            g_token * head.scale,
            g_support.masked_fill(support_ids < 0, 0.0) * head.scale,
            g_tail.masked_fill(lse_tail == -torch.inf, 0.0) * head.scale,
            lse,
            lse_tail,
        )
        of_entropy = None if entropy is None else _EntropyGradients.of(g_entropy * head.scale, entropy, lse)
        tiling = _Tiling.of(hidden, len(weight), ctx.chunk_tokens)
        buffer = hidden.new_empty(tiling.shape, dtype=lse.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiling.chunks:
                for tile in tiling.tiles:
                    z = buffer[: rows.stop - rows.start, : tile.stop - tile.start]
                    head.write(hidden[rows], tile, z)
                    slope = head.softcap_slope(z)
                    ids = _TileIds.of(token_ids[rows], tile), _TileIds.of(support_ids[rows], tile)
                    added = None if of_entropy is None else of_entropy.of_tile(rows, z)
                    _backward_tile(z, *ids, gradients.of_chunk(rows))
                    if added is not None:
                        z.add_(added)
                    if slope is not None:
                        z.mul_(slope)
                    if d_bias is not None:
                        d_bias[tile].add_(z.sum(0))
                    if d_hidden is not None:
                        _add_product_(d_hidden[rows], z, head.weight[tile])
                    if d_weight is not None:
                        _add_product_(d_weight[tile], z.t(), hidden[rows])
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; the sum, and what is added, are float32 at least."""
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(_product(a, b))


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32 at least, [rows of a, columns of b]."""
    half = next((x.dtype for x in (a, b) if x.dtype in HALF_DTYPES), None)
    if half is not None and a.device.type == "cuda":
        return torch.mm(a.to(half), b.to(half), out_dtype=torch.float32, out=out)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _tail_of_tile(z: Tensor, e: Tensor, support: _TileIds) -> tuple[Tensor, Tensor]:
    """Of a tile's part of the tail, the logsumexp [C, 1] and the entropy [C, 1].

    z [C, T] holds the logits and e [C, T] anything; both are overwritten. S is taken out before anything is summed:
    log(1 - sum over S) would have no correct digits for a small tail, nor would a sum with the maximum of the whole.
    """
    support.overwrite_(z, -torch.inf)
    shift = z.amax(-1, keepdim=True)
    # The maximum of an empty tail is -inf, and -inf - (-inf) would be NaN; its sum is 0.
    torch.exp(z.sub_(shift.masked_fill(shift == -torch.inf, 0.0)), out=e)
    sum_exp = e.sum(-1, keepdim=True)
    log_sum = sum_exp.log()
    support.overwrite_(z, 0.0)  # 0 * -inf would be NaN
    entropy = log_sum - e.mul_(z).sum(-1, keepdim=True) / sum_exp
    return shift + log_sum, entropy.masked_fill(sum_exp == 0, 0.0)


def _join_tails(support: Tensor, tails: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexp [C], logsumexp of the tail [C] and entropy [C] from the logits of S [C, K] and the tiles' tails."""
    tail, inner = (torch.cat(columns, -1) for columns in zip(*tails, strict=True))
    groups = torch.cat([support, tail], -1)  # tokens of S, and tails of tiles
    lse = groups.logsumexp(-1, keepdim=True)
    # The entropy of which group it is, and the mean entropy inside the group.
    entropy = torch.special.entr((groups - lse).exp()).sum(-1) + ((tail - lse).exp() * inner).sum(-1)
    return lse.squeeze(-1), tail.logsumexp(-1), entropy


class _RowGradients(NamedTuple):
    """What dz of a position needs besides its logits; see `_backward_tile`."""

    token: Tensor  # [N, 1] g_y
    support: Tensor  # [N, K] g_k
    total: Tensor  # [N, 1] G
    outside: Tensor  # [N, 1] g_tail - q_tail G
    lse: Tensor  # [N, 1]
    lse_tail: Tensor  # [N, 1]

    @classmethod
    def of(cls, token: Tensor, support: Tensor, tail: Tensor, lse: Tensor, lse_tail: Tensor) -> "_RowGradients":
        total = token + support.sum(-1) + tail
        columns = token, total, tail - (lse_tail - lse).exp() * total, lse, lse_tail
        token, total, outside, lse, lse_tail = (x.unsqueeze(-1) for x in columns)
        return cls(token, support, total, outside, lse, lse_tail)

    def of_chunk(self, rows: slice) -> "_RowGradients":
        return _RowGradients(*(x[rows] for x in self))


class _EntropyGradients(NamedTuple):
    """What the entropy adds to dz of a position: d H / d z_v = - q_v (log q_v + H)."""

    gradient: Tensor  # [N, 1] g_H
    entropy: Tensor  # [N, 1] H
    lse: Tensor  # [N, 1]

    @classmethod
    def of(cls, gradient: Tensor, entropy: Tensor, lse: Tensor) -> "_EntropyGradients":
        return cls(*(x.unsqueeze(-1) for x in (gradient, entropy, lse)))

    def of_tile(self, rows: slice, z: Tensor) -> Tensor:
        """[C, T] of the logits z [C, T] of a chunk, which stay as they are."""
        logprobs = z - self.lse[rows]
        return logprobs.exp().mul_(logprobs.add_(self.entropy[rows])).mul_(-self.gradient[rows])


def _backward_tile(z: Tensor, token: _TileIds, support: _TileIds, g: _RowGradients) -> None:
    """Overwrite the logits z [C, T] with dz, their gradient.

    dz_v = sum_k g_k 1[v = id_k] + g_y 1[v = y] - q_v G + 1[v not in S] g_tail exp(z_v - lse_tail), G the sum of all g.
    Outside S this is exp(z_v - lse_tail) (g_tail - q_tail G): one buffer, and no exponent is positive, however small
    the tail. Inside S that expression may overflow, or be NaN if the tail is empty, and is replaced.
    """
    inside = z.gather(1, support.columns).sub_(g.lse).exp_().mul_(-g.total)
    z.sub_(g.lse_tail).exp_().mul_(g.outside)
    support.overwrite_(z, inside)
    support.add_(z, g.support)
    token.add_(z, g.token)


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
    entropy_gradient: bool = False,
) -> HeadOutput:
    """Student log-probabilities of the sampled token, of the support and of the tail, with gradients.

    Args:
        hidden: [N, H] last hidden states, float64, float32, bfloat16 or float16.
        weight: [V, H] output embedding; may be tied to the input embedding. Its gradient is accumulated in float32.
        token_ids: [N] int64, the token sampled at each position, in 0..V-1.
        support_ids: [N, K] int64, distinct tokens of S in each row, -1 pads. K may be 0, or the whole vocabulary.
        bias: [V].
        temperature: divides the logits last (the student's half of kd_temperature).
        softcap: c of c * tanh(x / c), None for none (Gemma 2's final_logit_softcapping).
        logit_scale: multiplies h W^T + b first (Cohere's logit_scale).
        chunk_tokens: positions projected at a time; None: 1024, on a GPU 4096.
        entropy_gradient: whether the entropy carries a gradient.
    """
    num_positions, num_support = support_ids.shape
    assert hidden.shape == (num_positions, weight.shape[1]), (hidden.shape, weight.shape, support_ids.shape)
    assert token_ids.shape == (num_positions,), (token_ids.shape, support_ids.shape)
    if num_support == 0:  # one column of pads is the same S, and has a maximum
        support_ids = token_ids.new_full((num_positions, 1), -1)
    options = (temperature, softcap, logit_scale)
    token, support, tail, entropy = _SupportLogprobs.apply(
        hidden, weight, bias, token_ids.unsqueeze(-1), support_ids, options, chunk_tokens, entropy_gradient
    )
    # Not a view of the column of pads: FSDP2 puts its hooks on what a forward pass returns.
    return HeadOutput(token, support if num_support else support.new_empty((num_positions, 0)), tail, entropy)
