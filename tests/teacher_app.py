"""The teacher's guarded application in this process, without a port."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from services.config import TeacherConfig
from services.teacher.server import create_app, guarded

GOOD = {"token_ids": [5, 6], "prompt_length": 1}  # one row to score


class AppClient(httpx.AsyncClient):
    """A client whose requests go straight into the guarded application.

    Attributes:
        app: without its guard.
        service: of the application; Any, for tests reach into whatever scorer it has.
    """

    def __init__(self, app: FastAPI, key: str | None) -> None:
        self.app, self.guard = app, guarded(app, key)
        self.service: Any = app.state.service
        transport = httpx.ASGITransport(self.guard, raise_app_exceptions=False)
        super().__init__(transport=transport, base_url="http://teacher", trust_env=False)


@asynccontextmanager
async def serving(
    folder: str, *, key: str | None = None, wait: bool = True, **options: Any
) -> AsyncIterator[AppClient]:
    """A client of a teacher that is started here, and has loaded its model if one shall `wait` for that."""
    app = create_app(TeacherConfig(model=folder, **options))
    async with AppClient(app, key) as client, app.router.lifespan_context(app):
        while wait and client.service.scorer is None:
            await asyncio.sleep(0.01)
        yield client


async def score(client: httpx.AsyncClient, body: object, **headers: str) -> httpx.Response:
    return await client.post("/v1/teacher/logprobs", json=body, headers=headers)
