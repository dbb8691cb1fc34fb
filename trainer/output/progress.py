"""How far a run is, for whoever reads its log: a line at every evaluation and at the last step, and otherwise one every few
seconds.

A thread of its own writes them, for a step, or the loading of a model, may take longer than anybody waits in silence.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any, Self

from services.launch.panel import clock, describe_step_time

# services/launch/digest.py shows the lines of this logger under `distillserve up`.
logger = logging.getLogger(__name__)

_INTERVAL_S = 12.0
_POLL_S = 0.5
_TRAINING = "training"
_TIMES = ("step_s", "rollout_s", "teacher_s", "train_s", "push_s", "canary_s")
_NUMBERS = {"loss": "loss", "reverse KL": "single_step_kl", "reward": "reward_mean"}


class Progress:
    """Told what a run does; says so when it has said nothing for `interval_s` seconds."""

    def __init__(self, interval_s: float = _INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._spoke = time.monotonic()
        self._doing, self._since = _TRAINING, time.monotonic()
        self._rows: list[Mapping[str, Any]] = []  # of the steps since the last line
        self._last_row: Mapping[str, Any] = {}
        self._exact_match = ""
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside the block the run does `what`, e.g. "loading the student"."""
        before = self._doing
        self._begin(what)
        try:
            yield
        finally:
            self._begin(before)

    def step(self, row: Mapping[str, Any]) -> None:
        """A step is done; `row` is that of metrics.jsonl. The last one is told at once: a short run has no other line."""
        with self._lock:
            self._rows.append(row)
            self._last_row = row
            self._since = time.monotonic()
        if row["step"] == row["num_steps"]:
            self._say(self._describe())

    def evaluated(self, step: int, exact_match: float | None, reverse_kl: float) -> None:
        """The student was measured after a step."""
        exact = "" if exact_match is None else f"exact match {exact_match:.3f}, "
        self._exact_match = "" if exact_match is None else f"exact match {exact_match:.3f} (step {step})"
        self._say(f"step {step}: held-out {exact}reverse KL {reverse_kl:.4f}")

    def _begin(self, what: str) -> None:
        with self._lock:
            self._doing, self._since = what, time.monotonic()

    def _run(self) -> None:
        while not self._done.wait(_POLL_S):
            if time.monotonic() - self._spoke >= self._interval_s:
                self._say(self._describe())

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        logger.info("%s", line)

    def _describe(self) -> str:
        with self._lock:
            rows, self._rows = self._rows, []
            if rows:
                return describe_steps(rows, self._exact_match)
            so_far = f", {clock(time.monotonic() - self._since)} so far"
            if self._last_row and self._doing == _TRAINING:
                step, num_steps = int(self._last_row["step"]), int(self._last_row["num_steps"])
                return f"step {min(step + 1, num_steps)}/{num_steps} is under way{so_far}"
            return f"{self._doing}{so_far}"


def describe_steps(rows: list[Mapping[str, Any]], exact_match: str = "") -> str:
    """One line about the last of some steps, with the mean of their times.

    Args:
        rows: of metrics.jsonl, at least one.
        exact_match: that of the last evaluation, ready to be shown.
    """
    last = rows[-1]
    times = {name: fmean(row[name] for row in rows) for name in _TIMES if name in last}
    parts = [f"{label} {last[name]:.4f}" for label, name in _NUMBERS.items() if name in last]
    parts += [exact_match] if exact_match else []
    parts.append(f"{last['completion_tokens']:.1f} tokens a completion")
    parts.append(describe_step_time(times))
    parts.append(f"{clock((last['num_steps'] - last['step']) * times['step_s'])} left")
    return f"step {last['step']}/{last['num_steps']}: {', '.join(parts)}"
