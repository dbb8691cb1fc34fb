"""The end of a run for people: summary.json as a table, before and after."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """before -> after.

    Args:
        summary: the content of summary.json.
    """
    table = Table(title=f"{summary['steps']} steps, {summary['tokens']:,} sampled tokens, {summary['wall_s']:.0f} s")
    for column in ("held-out", "before", "after", "teacher"):
        table.add_column(column, justify="left" if column == "held-out" else "right")
    sides = [summary["before"] or {}, summary["after"] or {}]
    exact = [_percent(side.get("exact_match")) for side in (*sides, summary["teacher"])]
    table.add_row("exact match", *exact)
    table.add_row("reverse KL per token, nats", *map(_reverse_kl, sides), "0")
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _reverse_kl(side: Mapping[str, Any]) -> str:
    if "reverse_kl" not in side:
        return "-"
    error = "" if side.get("reverse_kl_stderr") is None else f" ± {side['reverse_kl_stderr']:.4f}"
    return f"{side['reverse_kl']:.4f}{error}"
