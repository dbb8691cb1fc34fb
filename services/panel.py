"""The live panel of `distillserve up`: where the run is, from the last row of its metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from rich.progress_bar import ProgressBar
from rich.table import Table

_TAIL_BYTES = 64 << 10


def last_step(path: Path) -> dict[str, Any]:
    """The last complete step row of a metrics.jsonl, or {} when there is none yet."""
    try:
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


def render(row: dict[str, Any], status: dict[str, str]) -> Table:
    """One table: a progress bar with time left, the metrics, the state of each role."""
    table = Table.grid(padding=(0, 2))
    step, total = row.get("step", 0), row.get("num_steps", 0)
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total=total or 1, completed=step, width=40), f"step {step}/{total or '?'}", _time_left(row))
    table.add_row(bar)
    numbers = {
        "reverse KL": _number(row, "single_step_kl", ".4f"),
        "k1": _number(row, "reverse_kl_k1", ".4f"),
        "loss": _number(row, "loss", ".4f"),
        "staleness": _number(row, "staleness", ".0f"),
    }
    table.add_row("  ".join(f"[bold]{name}[/] {value}" for name, value in numbers.items()))
    speeds = {role: _number(row, f"{role}_tokens_per_s", ",.0f") for role in ("rollout", "teacher", "trainer")}
    roles = "  ".join(f"[bold]{role}[/] {status.get(role, '-')} {speed} tok/s" for role, speed in speeds.items())
    table.add_row(roles)
    return table


def _number(row: dict[str, Any], name: str, pattern: str) -> str:
    value = row.get(name)
    return "-" if value is None else format(value, pattern)


def _time_left(row: dict[str, Any]) -> str:
    step, total, step_s = row.get("step", 0), row.get("num_steps", 0), row.get("step_s")
    if not step or not total or step_s is None:
        return ""
    left = int((total - step) * step_s)
    return f"{left // 60}:{left % 60:02d} left"
