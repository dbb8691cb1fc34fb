"""What this process waits for, written down where it waits: so that a watchdog can say who waits for whom, and since when."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_who: ContextVar[str] = ContextVar("who", default="the run")


class Wait:
    """One thing that is waited for.

    Args:
        who: waits, e.g. "step 12".
        what: is waited for, e.g. "scores of http://10.0.0.5:8101".
        kind: of those that take about as long as one another.
        on_dead: for what is dead when it shows no sign of life for long, and not slow: told which, as text. None: it may
            take its time, and whoever waits gives up by itself.

    Attributes:
        num_signs: of life, so far.
        progress: what has come of it, e.g. "14 of 32 have come".
        has_come: whether the wait ended because what was waited for came.
    """

    def __init__(self, who: str, what: str, kind: str, on_dead: Callable[[str], None] | None = None) -> None:
        self.who, self.what, self.kind, self.on_dead = who, what, kind, on_dead
        self.num_signs, self.progress, self.has_come = 0, "", False

    def ask_for_sign(self) -> None:
        """Called now and then by whoever looks; where signs of life do not come by themselves, ask for one."""

    def alive(self, progress: str = "") -> None:
        """A sign of life, from any thread."""
        self.progress = progress or self.progress
        self.num_signs += 1


class Waits:
    """All that is waited for now; its methods may be called from any thread."""

    def __init__(self) -> None:
        self._open: dict[int, Wait] = {}

    def add(self, wait: Wait) -> Wait:
        self._open[id(wait)] = wait
        return wait

    def remove(self, wait: Wait) -> None:
        self._open.pop(id(wait), None)

    def now(self) -> list[Wait]:
        return list(self._open.values())


WAITS = Waits()
"""Of this process."""


@contextmanager
def waiting_for(what: str, kind: str) -> Iterator[Wait]:
    """Inside the block `what` is waited for; tell signs of life with `Wait.alive`.

    Args:
        kind: e.g. "scores".
    """
    wait = WAITS.add(Wait(_who.get(), what, kind))
    try:
        yield wait
        wait.has_come = True
    finally:
        WAITS.remove(wait)


@contextmanager
def on_behalf_of(who: str) -> Iterator[None]:
    """What waits inside the block, tasks that are started there included, does so for `who`."""
    token = _who.set(who)
    try:
        yield
    finally:
        _who.reset(token)
