"""What of a role's output a person has to see; all of it is in the role's log.

Shown are the trainer's progress, and what our own code warns of. Libraries warn of much that nobody who runs us can change.
"""

import logging
import re
import signal
from collections.abc import Sequence

from rich.text import Text

from services.errors import ERROR_PREFIX
from services.logs import LogLine

PROGRESS_LOGGER = "trainer.output.progress"
"""The logger of the lines that say how far a run is."""

_OURS = ("services.", "trainer.")
_LAST_LINES, _LAST_LINES_BESIDE_CAUSE = 12, 4
_LONGEST_LAST_LINE = 400
# The last line of a traceback, behind the prefixes that torch's ranks and vLLM's processes give theirs.
_EXCEPTION = re.compile(
    r"(?:\[rank\d+\]: )?(?:\([^)]*\) )*(?:ERROR [\d-]+ [\d:]+ \[[^]]*\] )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b:? ?.*)"
)
_PROGRESS_BAR = re.compile(r"\d+%\|")
# Says only that another of vLLM's processes said why.
_NO_CAUSE = re.compile(r"root cause|EngineDeadError|WorkerProc init")


def digest(line: str, *, has_panel: bool) -> tuple[int, str] | None:
    """Level and text of a line of output that is worth showing.

    Args:
        has_panel: progress is shown elsewhere.
    """
    said = LogLine.parse(line)
    if said is None or not said.logger.startswith(_OURS):
        return None
    if said.logger == PROGRESS_LOGGER and said.level == logging.INFO:
        return None if has_panel else (said.level, said.message)
    return (said.level, said.message) if said.level >= logging.WARNING else None


def cause(tail: Sequence[str]) -> str | None:
    """Why a role failed, in its own words: its last error line, else the last exception; None when it said neither."""
    for line in reversed(tail):
        if line.startswith(ERROR_PREFIX):
            return line.removeprefix(ERROR_PREFIX)
    for line in map(plain, reversed(tail)):
        match = _EXCEPTION.fullmatch(line.strip())
        if match is not None and _NO_CAUSE.search(line) is None:
            return match[1]
    return None


def why_it_ended(title: str, code: int, tail: Sequence[str]) -> str:
    """Why a role ended, e.g. "the teacher failed: ..." with what it said itself, unless a signal ended it."""
    said = cause(tail) if code >= 0 else None
    return f"the {title} {how_it_ended(code)}" if said is None else f"the {title} failed: {said}"


def last_lines(tail: Sequence[str]) -> list[str]:
    """The lines to show of a role that failed, few where one of them says the cause; progress bars are none."""
    lines = [line for line in tail if not _PROGRESS_BAR.search(line)]
    shown = lines[-(_LAST_LINES if cause(tail) is None else _LAST_LINES_BESIDE_CAUSE) :]
    return [line if len(line) <= _LONGEST_LAST_LINE else line[:_LONGEST_LAST_LINE] + " ..." for line in shown]


def plain(line: str) -> str:
    """A line without colours, and without what would make a terminal do anything but show it."""
    text = Text.from_ansi(line).plain if "\x1b" in line else line
    return text if text.isprintable() else "".join(char if char.isprintable() else " " for char in text)


def how_it_ended(code: int) -> str:
    """An exit code, negative for a signal, in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        how = f"was ended by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        how = f"was ended by signal {-code}"
    if -code == signal.SIGKILL:
        how += ", which this run did not send: the kernel does so when memory runs out (see `dmesg`)"
    return how
