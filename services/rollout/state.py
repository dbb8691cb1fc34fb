"""What the handlers of one rollout server share; it lives as long as the process."""

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from services.http.places import Places
from services.rollout.admission import Admission
from services.rollout.holder import Holder
from services.rollout.settings import RolloutSettings

NEVER_PUSHED = "default"
"""vLLM's own word for the weights that a server was started with."""
MIXED = "mixed"
"""Some layers are of a push that was broken off, the others of the one before: no run ever asks for that."""


@dataclass(frozen=True)
class Stage:
    """Of a push, as it runs."""

    name: str
    deadline: float
    """On the monotonic clock, as `started`."""
    started: float = field(default_factory=time.monotonic)


@dataclass
class RolloutState:
    settings: RolloutSettings
    boot_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """New at every start, so that a restart is recognised. One process answers, so there is one."""
    holder: Holder = field(default_factory=Holder)
    admission: Admission = field(default_factory=Admission)
    places: Places = field(init=False)
    policy_version: str = NEVER_PUSHED
    """The label of the weights that sample."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the stage that runs."""
    stage: Stage | None = None
    is_paused: bool = False
    """Whether the engine was paused and not resumed since."""
    unanswered: tuple[Stage, asyncio.Future[Any]] | None = None
    """A call that the engine had not answered at its deadline, and may still work on."""
    timeout_s: float = 120.0
    """Deadline of a stage, as the trainer that connected last wants it."""
    watching: asyncio.Task[None] | None = None
    """What notices that the holder is gone."""

    def __post_init__(self) -> None:
        self.places = Places(self.settings.max_pending_requests)
