"""Hidden states to the rows of an answer, a chunk of positions at a time: [positions, vocabulary] logits never exist.

Shapes: R positions, C positions of a chunk, G positions of a group, H hidden, V vocabulary, K candidates, M support ids.

On a CPU a position costs less in the matrix product than in the passes over its V logits when each pass reads them
from memory, so these run over a few positions at a time, whose logits stay in the cache.
"""

import threading

import torch

from services.errors import DistillServeError
from services.models.causal_lm import OutputHead
from services.teacher.jobs import Columns

# Elements of one chunk of float32 logits: 64 Mi are 256 MiB.
_MAX_CHUNK_ELEMENTS = 64 << 20
# Logits that are reduced together on a CPU: 4 MiB.
_CPU_GROUP_ELEMENTS = 1 << 20
# Mass relative to the likeliest token below which float32 has lost digits, or everything.
_SMALL_MASS = 1e-20


class ScoringHead:
    """A model's output head, and what is asked of its logits.

    Args:
        rows_per_chunk: positions that are projected at once, less when the vocabulary is large.
    """

    def __init__(self, output: OutputHead, rows_per_chunk: int) -> None:
        self._output = output
        self._size = max(1, min(rows_per_chunk, _MAX_CHUNK_ELEMENTS // len(output.weight)))
        self._of_thread = threading.local()

    def score(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        support: torch.Tensor | None,
        *,
        top_k: int,
        temperature: float,
    ) -> Columns:
        """The rows of [R, H] hidden states.

        Args:
            targets: [R] tokens that follow, on the CPU.
            support: [R, M] ids to score, or None.
            temperature: divides the logits before the softmax.

        Raises:
            DistillServeError: the logits of a position are not finite.
        """
        columns = Columns.empty(len(hidden), top_k, None if support is None else support.shape[1])
        for start in range(0, len(hidden), self._size):
            part = slice(start, min(start + self._size, len(hidden)))
            logits = self._output.float32_logits(hidden[part], self._buffer(hidden, part.stop - part.start))
            of_part = None if support is None else support[part]
            reduce_logits(columns, part, logits, targets[part], of_part, temperature=temperature)
        return columns

    def _buffer(self, hidden: torch.Tensor, num_rows: int) -> torch.Tensor | None:
        """Where to write the logits; a GPU's allocator keeps its memory by itself."""
        if hidden.is_cuda:
            return None
        logits: torch.Tensor | None = getattr(self._of_thread, "logits", None)
        if logits is None:
            logits = hidden.new_empty((self._size, len(self._output.weight)), dtype=torch.float32)
            self._of_thread.logits = logits
        return logits[:num_rows]


def reduce_logits(
    columns: Columns,
    rows: slice,
    logits: torch.Tensor,
    targets: torch.Tensor,
    support: torch.Tensor | None,
    *,
    temperature: float,
) -> None:
    """Reduce [C, V] float32 logits, which are overwritten, to rows of the answer.

    Args and errors as of `ScoringHead.score`.
    """
    size = len(logits) if logits.is_cuda else max(1, _CPU_GROUP_ELEMENTS // logits.shape[1])
    columns.token_ids[rows] = targets.numpy()
    for start in range(0, len(logits), size):
        group = slice(start, min(start + size, len(logits)))
        _reduce_group(
            columns,
            slice(rows.start + group.start, rows.start + group.stop),
            logits[group].div_(temperature),
            targets[group].to(logits.device),
            None if support is None else support[group].to(logits.device),
        )


def _reduce_group(
    columns: Columns, rows: slice, logits: torch.Tensor, targets: torch.Tensor, support: torch.Tensor | None
) -> None:
    """`reduce_logits` of [G, V] logits; all on one device."""
    relative = logits.sub_(logits.amax(-1, keepdim=True))
    masses = relative.exp()
    total = masses.sum(-1)
    if not bool(torch.isfinite(total).all()):
        raise DistillServeError("the teacher's logits are not finite; its weights or its dtype are not usable")
    log_total = total.log()

    def logprobs(ids: torch.Tensor) -> torch.Tensor:
        return relative.gather(1, ids) - log_total.unsqueeze(1)

    def log_mass_outside(ids: torch.Tensor) -> torch.Tensor:
        return _log_sum_outside(relative, masses, ids) - log_total

    ids = _top_k_ids(relative, log_total, columns.topk_ids.shape[1])
    columns.token_logprobs[rows] = logprobs(targets.unsqueeze(1)).squeeze(1).cpu().numpy()
    columns.topk_ids[rows] = ids.cpu().numpy()
    columns.topk_logprobs[rows] = logprobs(ids).cpu().numpy()
    columns.tail_logprobs[rows] = log_mass_outside(ids).cpu().numpy()
    if support is not None:
        assert columns.support_logprobs is not None and columns.support_tail_logprobs is not None
        columns.support_logprobs[rows] = logprobs(support).cpu().numpy()
        columns.support_tail_logprobs[rows] = log_mass_outside(support).cpu().numpy()
    columns.entropies[rows] = (log_total - _mass_weighted_sum(relative, masses) / total).cpu().numpy()


def _top_k_ids(relative: torch.Tensor, log_total: torch.Tensor, k: int) -> torch.Tensor:
    """[G, k] ids by falling logprob; equal logprobs by rising id, which torch.topk does not promise."""
    values, ids = torch.topk(relative, min(k + 1, relative.shape[1]), dim=-1)
    # Values that differ can become equal logprobs, and it is those that are ordered.
    values = values - log_total.unsqueeze(1)
    tied = (values[:, 1:] == values[:, :-1]).any(-1)
    ids = ids[:, :k]
    if bool(tied.any()):
        logprobs = relative[tied] - log_total[tied].unsqueeze(1)
        ids[tied] = torch.sort(logprobs, dim=-1, descending=True, stable=True).indices[:, :k]
    return ids


def _log_sum_outside(relative: torch.Tensor, masses: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[G] log of the sum of the masses of all tokens not in ids [G, K]; -inf when there are none.

    A sum over the complement: log(1 - sum) would lose everything below float32's resolution of 1.
    """
    sums = masses.scatter(1, ids, 0.0).sum(-1)
    logs = sums.log()
    small = sums < _SMALL_MASS
    if bool(small.any()):
        logs[small] = relative[small].scatter(1, ids[small], -torch.inf).logsumexp(-1)
    return logs


def _mass_weighted_sum(relative: torch.Tensor, masses: torch.Tensor) -> torch.Tensor:
    """[G] sum over the vocabulary of exp(x) * x, x the [G, V] relative logits, which are destroyed, and masses exp(x).

    Impossible tokens (x = -inf) add nothing. Divided by the sum of the masses it is the mean of x.
    """
    sums = relative.mul_(masses).sum(-1)
    # 0 * -inf; seldom, for a model has to rule a token out altogether.
    impossible = torch.isnan(sums)
    if bool(impossible.any()):
        sums[impossible] = torch.special.xlogy(masses[impossible], masses[impossible]).sum(-1)
    return sums
