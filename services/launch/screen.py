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

from services.launch.digest import digest, plain
from services.launch.panel import Stage, last_evaluation, last_step, render

_POLL_S = 0.25
_SILENCE_S = 13.0
_SHOWN_ONCE = 100
_WIDTH = 80
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
        if self._console.width < 1:  # COLUMNS=0, with which nothing at all would be shown
            self._console.width = _WIDTH
        self._verbose, self._metrics, self._on_reader_gone = verbose, metrics, on_reader_gone
        self._started = time.time()
        self._spoke = time.monotonic()
        self._warned: dict[str, None] = {}
        self.stages: dict[str, Stage] = {}
        """What each role is doing."""

    @property
    def has_panel(self) -> bool:
        """Whether this is a terminal that can draw one; FORCE_COLOR makes rich call a pipe one."""
        return self._console.file.isatty() and self._console.is_terminal and not self._console.is_dumb_terminal

    def say(self, message: str, role: str = "up", style: str = "") -> None:
        """A line, with who it is about."""
        self._spoke = time.monotonic()
        self._print(Text.assemble((f"{role:<7} | ", _COLOURS.get(role.split()[0], "bold")), (plain(message), style)))

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
            self.say(line, role)
            return
        found = digest(line, has_panel=self.has_panel)
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
        if self.has_panel:
            await self._show_panel()
        while True:
            await asyncio.sleep(_POLL_S)
            if time.monotonic() - self._spoke >= _SILENCE_S:
                self._read_last_step()
                waiting = [(role, stage) for role, stage in self.stages.items() if stage.is_waiting]
                if waiting:  # a server that comes back rather than the trainer, which waits for it
                    role, stage = max(waiting, key=lambda one: one[1].since)
                    self.say(stage.describe(time.monotonic()), role)

    async def _show_panel(self) -> None:
        evaluation: dict[str, Any] = {}
        with Live(console=self._console, transient=True, auto_refresh=False) as live:
            while True:
                row = self._read_last_step()
                evaluation = last_evaluation(self._metrics, self._started) or evaluation
                elapsed_s = time.time() - self._started
                live.update(render(row, evaluation, self.stages, elapsed_s, time.monotonic()), refresh=True)
                await asyncio.sleep(_POLL_S)

    def _read_last_step(self) -> dict[str, Any]:
        """The last row; with one that it wrote since it was started, the trainer is known to train."""
        row, trainer = last_step(self._metrics, self._started), self.stages.get("trainer")
        if row and trainer is not None and (trainer.doing == "starting" or trainer.is_restart):
            since = time.time() - (time.monotonic() - trainer.since) if trainer.is_restart else self._started
            if last_step(self._metrics, since):
                self.stages["trainer"] = Stage("training", time.monotonic())
        return row

    def _print(self, what: Text | Table) -> None:
        try:
            self._console.print(what, soft_wrap=isinstance(what, Text))
        except SystemExit:
            # rich's answer to a reader that has gone away, after which it prints nothing more. A task that ended with
            # it would leave the roles blocked on a full pipe.
            self._on_reader_gone()
        except OSError:  # the disk of the file that this goes into is full: there is nobody to tell
            return
