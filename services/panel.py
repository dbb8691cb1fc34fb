"""The live panel of `distillserve up`: where the run is, from the last row of its metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

_TAIL_BYTES = 64 << 10


def last_step(path: Path, since: float) -> dict[str, Any]:
    """The last complete step row of a metrics.jsonl, or {} when there is none yet.

    Args:
        since: a file last written before this (seconds since the epoch) is that of an earlier run in the same
            folder, which the trainer deletes only when it starts.
    """
    try:
        if path.stat().st_mtime < since:
            return {}
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # half a line: the trainer is writing it
            continue
        if isinstance(row, dict) and "num_steps" in row:
            return row
    return {}


def render(row: dict[str, Any], status: dict[str, str], elapsed_s: float) -> Table:
    """One table: a progress bar with time elapsed and left, the metrics, the state of each role."""
    table = Table.grid(padding=(0, 2))
    step, total = row.get("step", 0), row.get("num_steps", 0)
    bar = Table.grid(padding=(0, 1))
    times = f"{_clock(elapsed_s)} elapsed{_time_left(row)}"
    bar.add_row(ProgressBar(total=total or 1, completed=step, width=40), f"step {step}/{total or '?'}", times)
    table.add_row(bar)
    numbers = {
        "reverse KL": _number(row, "single_step_kl", ".4f"),
        "k1": _number(row, "reverse_kl_k1", ".4f"),
        "loss": _number(row, "loss", ".4f"),
        "staleness": _number(row, "staleness", ".0f"),
    }
    table.add_row("  ".join(f"[bold]{name}[/] {value}" for name, value in numbers.items()))
    table.add_row("  ".join(f"[bold]{name}[/] {escape(value)}" for name, value in _completions(row).items()))
    speeds = {role: _number(row, f"{role}_tokens_per_s", ",.0f") for role in ("rollout", "teacher", "trainer")}
    roles = "  ".join(f"[bold]{role}[/] {status.get(role, '-')} {speed} tok/s" for role, speed in speeds.items())
    table.add_row(roles)
    return table


def _completions(row: dict[str, Any]) -> dict[str, str]:
    """How long the completions of the last step were, and how they ended."""
    ends = [(name, value) for name, value in row.items() if name.startswith("ended_by_")]
    shares = [f"{value:.0%} {name.removeprefix('ended_by_').removesuffix('_fraction')}" for name, value in ends]
    return {
        "completion": f"{_number(row, 'completion_tokens', '.1f')} tokens",
        "truncated": _number(row, "truncated_fraction", ".0%"),
        "ended by": ", ".join(shares) or "-",
    }


def _number(row: dict[str, Any], name: str, pattern: str) -> str:
    value = row.get(name)
    return "-" if value is None else format(value, pattern)


def _time_left(row: dict[str, Any]) -> str:
    step, total, step_s = row.get("step", 0), row.get("num_steps", 0), row.get("step_s")
    if not step or not total or step_s is None:
        return ""
    return f", {_clock((total - step) * step_s)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
