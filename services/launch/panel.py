"""The live panel of `distillserve up`: where the run is, from the last rows of its metrics.jsonl."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

_TAIL_BYTES = 64 << 10


@dataclass(frozen=True)
class Stage:
    """What a role is doing, and since when."""

    doing: str
    since: float = 0.0
    """Monotonic, seconds."""

    @property
    def is_waiting(self) -> bool:
        """Whether it is on the way to something else."""
        return self.doing not in ("ready", "ended")

    @property
    def is_restart(self) -> bool:
        """Whether it worked before: "starting again (1 of 3)"."""
        return self.doing.startswith("starting again")

    def describe(self, now: float) -> str:
        """E.g. "starting for 0:30"."""
        return f"{self.doing} for {clock(now - self.since)}"


def last_step(path: Path, since: float) -> dict[str, Any]:
    """The last complete step row of a metrics.jsonl, or {} when there is none yet.

    Args:
        since: a file last written before this (seconds since the epoch) is that of an earlier run in the same
            folder, which the trainer deletes only when it starts.
    """
    return next((row for row in _newest_rows(path, since) if "num_steps" in row), {})


def last_evaluation(path: Path, since: float) -> dict[str, Any]:
    """As `last_step`, of the rows of evaluations."""
    return next((row for row in _newest_rows(path, since) if "eval_reverse_kl" in row), {})


def _newest_rows(path: Path, since: float) -> Iterator[dict[str, Any]]:
    try:
        if path.stat().st_mtime < since:
            return
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # half a line: the trainer is writing it
            continue
        if isinstance(row, dict):
            yield row


def render(
    row: Mapping[str, Any], evaluation: Mapping[str, Any], stages: Mapping[str, Stage], elapsed_s: float, now: float
) -> Table:
    """One table: a progress bar with time elapsed and left, the metrics, the state of each role.

    Args:
        row: of the last step; evaluation: of the last evaluation; both may be empty.
        now: monotonic, seconds.
    """
    table = Table.grid(padding=(0, 2))
    step, total = row.get("step", 0), row.get("num_steps", 0)
    bar = Table.grid(padding=(0, 1))
    times = f"{clock(elapsed_s)} elapsed{_time_left(row)}"
    bar.add_row(ProgressBar(total=total or 1, completed=step, width=40), f"step {step}/{total or '?'}", times)
    table.add_row(bar)
    if row:
        numbers = {
            "reverse KL": _number(row, "single_step_kl", ".4f"),
            "k1": _number(row, "reverse_kl_k1", ".4f"),
            "loss": _number(row, "loss", ".4f"),
            "staleness": _number(row, "staleness", ".0f"),
        }
        table.add_row(_named(numbers))
    if evaluation:
        table.add_row(_named(_held_out(evaluation)))
    if row:
        table.add_row(_named(_completions(row)))
        table.add_row(_named({"time": describe_step_time(row)}))
    table.add_row(_named(_roles(row, stages, now)))
    return table


def describe_step_time(row: Mapping[str, Any]) -> str:
    """Seconds a step and where they go: "0.41 s a step (rollout 0.07, teacher 0.03, train 0.12, push 0.06, canary 0.05)"."""
    parts = [(name, row.get(f"{name}_s")) for name in ("rollout", "teacher", "train", "push", "canary")]
    shown = ", ".join(f"{name} {_seconds(value)}" for name, value in parts if value is not None)
    return f"{_seconds(row.get('step_s', 0.0))} s a step" + (f" ({shown})" if shown else "")


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _named(values: Mapping[str, str]) -> str:
    return "  ".join(f"[bold]{name}[/] {escape(value)}" for name, value in values.items())


def _held_out(evaluation: Mapping[str, Any]) -> dict[str, str]:
    exact = _number(evaluation, "eval_exact_match", ".1%")
    return {
        "held-out": f"after step {evaluation['step']}",
        "exact match": exact,
        "reverse KL": _number(evaluation, "eval_reverse_kl", ".4f"),
    }


def _roles(row: Mapping[str, Any], stages: Mapping[str, Stage], now: float) -> dict[str, str]:
    """What each process does, and how fast those of a role are together."""
    shown = {}
    for role in ("rollout", "teacher", "trainer"):
        speed = _number(row, f"{role}_tokens_per_s", ",.0f")
        names = [name for name in stages if name.split()[0] == role] or [role]
        for name in names:
            stage, has_speed = stages.get(name), name == role and (len(names) == 1 or role == "trainer")
            if stage is None:
                shown[name] = "-"
            elif has_speed and not stage.is_restart and (speed != "-" or not stage.is_waiting):
                shown[name] = f"{stage.doing} {speed} tok/s"
            else:
                shown[name] = stage.describe(now) if stage.is_waiting else stage.doing
        if len(names) > 1 and role != "trainer":
            shown[f"{role} in all"] = f"{speed} tok/s"
    return shown


def _completions(row: Mapping[str, Any]) -> dict[str, str]:
    """How long the completions of the last step were, and how they ended."""
    ends = [(name, value) for name, value in row.items() if name.startswith("ended_by_")]
    shares = [f"{value:.0%} {name.removeprefix('ended_by_').removesuffix('_fraction')}" for name, value in ends]
    return {
        "completion": f"{_number(row, 'completion_tokens', '.1f')} tokens",
        "truncated": _number(row, "truncated_fraction", ".0%"),
        "ended by": ", ".join(shares) or "-",
    }


def _number(row: Mapping[str, Any], name: str, pattern: str) -> str:
    value = row.get(name)
    return "-" if value is None else format(value, pattern)


def _time_left(row: Mapping[str, Any]) -> str:
    step, total, step_s = row.get("step", 0), row.get("num_steps", 0), row.get("step_s")
    if not step or not total or step_s is None:
        return ""
    return f", {clock((total - step) * step_s)} left"


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 1:05, 1:02:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
