"""What a Python script that trains shows of its run: the same lines, and on a terminal the same panel, as `distillserve up`."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from services.launch.role_log import next_log
from services.launch.screen import Screen
from services.logs import TextFormatter, add_request_id
from services.process.files import cannot_write

_OURS = ("services", "trainer")


class ScriptScreen:
    """A screen with a thread of its own, beside a main thread that trains.

    Args:
        metrics: metrics.jsonl of the run, for the panel.
    """

    def __init__(self, metrics: Path) -> None:
        self._screen = Screen(verbose=False, metrics=metrics, on_reader_gone=lambda: None)
        self._started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._show()), name="screen", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        loop, is_over = self._started.result()
        loop.call_soon_threadsafe(is_over.set)
        self._thread.join()

    async def _show(self) -> None:
        is_over = asyncio.Event()
        self._started.set_result((asyncio.get_running_loop(), is_over))
        showing = asyncio.create_task(self._screen.run())
        await is_over.wait()
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)

    def say(self, *arguments: str) -> None:
        """As Screen.say; from any thread."""
        self._call(self._screen.say, *arguments)

    def stage(self, *arguments: str) -> None:
        """As Screen.stage; from any thread."""
        self._call(self._screen.stage, *arguments)

    def ended(self, role: str) -> None:
        """A role is not there any more."""
        self._call(lambda: self._screen.stages.pop(role, None))

    def role_said(self, role: str, line: str) -> None:
        """As Screen.role_said; from any thread."""
        self._call(self._screen.role_said, role, line)

    def _call(self, function: Any, *arguments: str) -> None:
        loop, _ = self._started.result()
        try:
            loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # a line that comes after the end
            return

    @contextmanager
    def showing_trainer(self, log: Path) -> Iterator[None]:
        """Inside the block this process is the trainer: what it logs is in `log`, and on the screen where a person has to
        see it.

        Args:
            log: of the first such trainer in this folder; later ones get the next name that is free.

        Raises:
            OutputError: the file cannot be made.
        """
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(next_log(log), mode="w", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise cannot_write(log, error) from error
        handlers = [_ToScreen(self), file]
        for handler in handlers:
            handler.addFilter(add_request_id)
            handler.setFormatter(TextFormatter())
        levels = {name: logging.getLogger(name).level for name in _OURS}
        for logger in map(logging.getLogger, _OURS):
            logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
            for handler in handlers:
                logger.addHandler(handler)
        self.stage("trainer", "starting")
        try:
            yield
        finally:
            self.ended("trainer")
            for logger in map(logging.getLogger, _OURS):
                logger.setLevel(levels[logger.name])
                for handler in handlers:
                    logger.removeHandler(handler)
            file.close()


class _ToScreen(logging.Handler):
    def __init__(self, screen: ScriptScreen) -> None:
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        first, *_ = self.format(record).splitlines() or [""]
        self._screen.role_said("trainer", first)
