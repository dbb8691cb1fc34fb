"""What `distillserve up` shows: a line for everything that happens and, on a terminal, a panel below them.

Without a terminal (a pipe, a file, a container's log) there is a line at least every `_SILENCE_S` seconds instead: the
trainer's own while it trains, else what is being waited for.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.digest import digest
from services.panel import Stage, last_evaluation, last_step, render

_POLL_S = 0.25
_SILENCE_S = 13.0
_SHOWN_ONCE = 100
_COLOURS = {"rollout": "cyan", "teacher": "magenta", "trainer": "green"}
_LEVELS = {logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "red")}


class Screen:
    """The console of one run.

    Args:
        verbose: show every line of every role.
        metrics: metrics.jsonl of the run, for the panel.
        on_reader_gone: called when nobody reads what is printed any more (`| head`).
    """

    def __init__(self, *, verbose: bool, metrics: Path, on_reader_gone: Callable[[], None]) -> None:
        self._console = Console(highlight=False)
        self._verbose, self._metrics, self._on_reader_gone = verbose, metrics, on_reader_gone
        self._started = time.time()
        self._spoke = time.monotonic()
        self._warned: dict[str, None] = {}
        self.stages: dict[str, Stage] = {}
        """What each role is doing."""

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def say(self, message: str, role: str = "up", style: str = "") -> None:
        """A line, with who it is about."""
        self._spoke = time.monotonic()
        self._print(Text.assemble((f"{role:<8}| ", _COLOURS.get(role, "bold")), (message, style)))

    def stage(self, role: str, doing: str, more: str = "") -> None:
        """A role begins something.

        Args:
            doing: e.g. "starting"; repeated when nothing else is said for a while.
            more: said once, e.g. how long it usually takes.
        """
        self.stages[role] = Stage(doing, time.monotonic())
        self.say(f"{doing} {more}" if more else doing, role)

    def role_said(self, role: str, line: str) -> None:
        """Show a line of a role's output, if a person has to see it."""
        if self._verbose:
            self.say(Text.from_ansi(line).plain, role)
            return
        found = digest(line, has_panel=self.is_terminal)
        if found is None:
            return
        level, message = found
        label, style = _LEVELS.get(min(level, logging.ERROR), ("", ""))
        if label and message in self._warned:
            return
        if label and len(self._warned) < _SHOWN_ONCE:
            self._warned[message] = None
        self.say(label + message, role, style)

    def table(self, table: Table) -> None:
        self._print(table)

    async def run(self) -> None:
        """Keep the panel fresh, or break the silence; ends when it is cancelled."""
        if self.is_terminal:
            await self._show_panel()
        while True:
            await asyncio.sleep(_POLL_S)
            if time.monotonic() - self._spoke >= _SILENCE_S:
                self._note_training(last_step(self._metrics, self._started))
                waiting = [(role, stage) for role, stage in self.stages.items() if stage.is_waiting]
                for role, stage in waiting[-1:]:
                    self.say(stage.describe(time.monotonic()), role)

    async def _show_panel(self) -> None:
        evaluation: dict[str, Any] = {}
        with Live(console=self._console, transient=True, auto_refresh=False) as live:
            while True:
                row = last_step(self._metrics, self._started)
                evaluation = last_evaluation(self._metrics, self._started) or evaluation
                self._note_training(row)
                elapsed_s = time.time() - self._started
                live.update(render(row, evaluation, self.stages, elapsed_s, time.monotonic()), refresh=True)
                await asyncio.sleep(_POLL_S)

    def _note_training(self, row: dict[str, Any]) -> None:
        """A trainer that has done a step is starting no more."""
        if row and (stage := self.stages.get("trainer")) is not None and stage.doing == "starting":
            self.stages["trainer"] = Stage("training", stage.since)

    def _print(self, what: Text | Table) -> None:
        try:
            self._console.print(what, soft_wrap=isinstance(what, Text))
        except SystemExit:
            # rich's answer to a reader that has gone away, after which it prints nothing more. A task that ended with
            # it would leave the roles blocked on a full pipe.
            self._on_reader_gone()
        except OSError:  # the disk of the file that this goes into is full: there is nobody to tell
            return
