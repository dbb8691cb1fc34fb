"""The teachers of a run: that of the rows that name none, and further ones by name.

consumes   prompts, whose rows name their teacher
produces   for each teacher the prompts it scores
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from services.clients import TeacherClient
from services.clients.teacher_answers import TokenIdsAndPromptLength
from services.clients.teacher_probe import ProbeAnswer
from services.config import RunConfig
from services.config.addresses import checked_urls
from services.errors import ConfigError, DistillServeError
from services.wire.teacher import TeacherInfo, TeacherScores
from trainer.data.prompts import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """Equal servers of one model."""

    name: str | None
    """As rows and teacher_client.named say it; None: the teacher of rows that name none."""
    client: TeacherClient
    info: TeacherInfo
    """What its servers say of themselves, with the tightest of their limits."""

    async def score(self, sequences: list[TokenIdsAndPromptLength], **options: Any) -> TeacherScores:
        """As TeacherClient.score; its errors say which teacher they are of."""
        with naming(self.name):
            return await self.client.score(sequences, **options)


class Teachers:
    """All teachers of a run; iterating yields each once."""

    def __init__(self, teachers: Iterable[Teacher]) -> None:
        self._by_name = {teacher.name: teacher for teacher in teachers}

    def __iter__(self) -> Iterator[Teacher]:
        return iter(self._by_name.values())

    def probe_answers(self) -> dict[str, ProbeAnswer]:
        """What each has answered to its probe, by its option."""
        section = "teacher_client"
        return {f"{section}.named.{t.name}" if t.name else section: t.client.probe_answer for t in self}

    def distrust(self) -> None:
        """Each is asked its probe before it scores again."""
        for teacher in self:
            teacher.client.distrust()

    def split(self, prompts: Iterable[Prompt]) -> list[tuple[Teacher, list[int]]]:
        """Each teacher that has something to score, and the places of its prompts among `prompts`, rising."""
        places: dict[str | None, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(prompt.teacher, []).append(place)
        return [(self._by_name[name], own) for name, own in places.items()]


def teacher_urls(config: RunConfig, in_rows: set[str | None]) -> dict[str | None, list[str]]:
    """The servers of each teacher of the run: all named ones, and that of the section itself if a row is its.

    Args:
        in_rows: names that rows give; None for those that give none.

    Raises:
        ConfigError: rows that name no teacher would be scored by a named one.
    """
    urls: dict[str | None, list[str]] = {}
    named = config.teacher_client.named
    if None in in_rows or not named:
        urls[None] = config.teacher_urls()
    for name, own in named.items():
        own = checked_urls(f"teacher_client.named.{name}", own, base_path=True)
        if shared := {*own} & {*urls.get(None, [])}:
            raise ConfigError(
                f"teacher_client.named.{name} names {shared.pop()}, where rows without a teacher are scored (teacher.host and "
                "teacher.port); give their teacher with teacher_client.urls, or name one in every row"
            )
        if name not in in_rows:
            logger.warning("no row names the teacher %r of teacher_client.named", name)
        urls[name] = own
    return urls


def option_prefix(name: str | None) -> str:
    """What a message about a teacher begins with: its option, or nothing for the one of the section itself."""
    return "" if name is None else f"teacher_client.named.{name}: "


@contextmanager
def naming(name: str | None) -> Iterator[None]:
    """Errors inside, of whatever kind, begin with the teacher's option."""
    try:
        yield
    except DistillServeError as error:
        error.args = (f"{option_prefix(name)}{error}",)
        raise
