"""The scores of one completion as a table for people."""

import numpy as np
from rich.table import Table
from rich.text import Text

from services.wire.teacher import TeacherScores


def render_scores(scores: TeacherScores, tokens: dict[int, str]) -> Table:
    """One line a scored token.

    Args:
        scores: of one sequence, R rows.
        tokens: the tokenizer's spelling of each id.
    """
    table = Table()
    for name in ("token", "logprob", "rank", "entropy", "top candidates"):
        table.add_column(name, justify="right" if name in ("logprob", "rank", "entropy") else "left")
    for row, token in enumerate(scores.token_ids.tolist()):
        table.add_row(
            _spelling(token, tokens),
            f"{scores.token_logprobs[row]:.4f}",
            _rank(token, scores.topk_ids[row]),
            f"{scores.entropies[row]:.3f}",
            _candidates(scores.topk_ids[row], scores.topk_logprobs[row], tokens),
        )
    return table


def describe_totals(scores: TeacherScores) -> str:
    """What the rows come to."""
    total, count = float(scores.token_logprobs.astype(np.float64).sum()), len(scores.token_logprobs)
    return (
        f"total logprob {total:.4f} over {count} tokens, perplexity {np.exp(-total / count):.4g}, "
        f"mean entropy {scores.entropies.mean():.3f} nats; {scores.model} at temperature {scores.temperature:g}"
    )


def _rank(token: int, candidates: np.ndarray) -> str:
    """1 for the likeliest token."""
    ranks = np.flatnonzero(candidates == token) + 1
    return str(ranks[0]) if len(ranks) else f"> {len(candidates)}"


def _candidates(ids: np.ndarray, logprobs: np.ndarray, tokens: dict[int, str]) -> Text:
    pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
    return Text("  ").join(_spelling(i, tokens).append(f" {logprob:.2f}", style="dim") for i, logprob in pairs)


def _spelling(token: int, tokens: dict[int, str]) -> Text:
    """As Text, for a token may look like markup; quoted where it would not be seen."""
    spelled = tokens.get(token, f"<{token}>")
    return Text(spelled if spelled.isprintable() and spelled.strip() else repr(spelled))
