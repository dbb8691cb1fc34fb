"""Logits of a chunk of positions to the rows of an answer.

Shapes: C positions of a chunk, G positions of a group, V vocabulary, K candidates, M support ids.

On a CPU a position costs less in the matrix product than in the passes over its V logits when each pass reads them
from memory, so these run over a few positions at a time, whose logits stay in the cache.
"""

import torch

from services.errors import DistillServeError
from services.teacher.jobs import Columns

# Logits that are reduced together on a CPU: 4 MiB.
_CPU_GROUP_ELEMENTS = 1 << 20
# Mass relative to the likeliest token below which float32 has lost digits, or everything.
_SMALL_MASS = 1e-20


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

    Args:
        targets: [C] tokens that follow.
        support: [C, M] ids to score, or None.
        temperature: divides the logits before the softmax.

    Raises:
        DistillServeError: a row of logits is not finite.
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
    columns.entropies[rows] = (log_total - _mean(relative, masses) / total).cpu().numpy()


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


def _mean(relative: torch.Tensor, masses: torch.Tensor) -> torch.Tensor:
    """[G] sum of mass times log mass; tokens that are impossible add nothing. Overwrites `relative`."""
    means = relative.mul_(masses).sum(-1)
    # 0 * -inf; seldom, for a model has to rule a token out altogether.
    impossible = torch.isnan(means)
    if bool(impossible.any()):
        means[impossible] = torch.special.xlogy(masses[impossible], masses[impossible]).sum(-1)
    return means
