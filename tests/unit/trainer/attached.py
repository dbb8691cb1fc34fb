"""Teachers as they are after the preflight, over any client."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from services.clients import TeacherClient
from services.wire.teacher import TeacherInfo
from tests.scripted_teacher import INFO
from tests.teacher_app import serving
from trainer.teachers import Teacher, Teachers


def attached(client: object, info: TeacherInfo = INFO, name: str | None = None) -> Teacher:
    return Teacher(name, client, info)  # type: ignore[arg-type]


def alone(client: object, info: TeacherInfo = INFO) -> Teachers:
    """A run's only teacher."""
    return Teachers([attached(client, info)])


@asynccontextmanager
async def teacher_of(folder: str, name: str | None = None, **options: Any) -> AsyncIterator[Teacher]:
    """A real teacher in this process."""
    async with serving(folder, **options) as app:
        client = TeacherClient(["http://teacher"], transport=httpx.ASGITransport(app.guard))
        (info,) = await client.info()
        yield Teacher(name, client, info)
        await client.close()
