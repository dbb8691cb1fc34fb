"""The teacher's guarded application in this process, without a port."""

import asyncio
from contextlib import asynccontextmanager

import httpx

from services.config import TeacherConfig
from services.teacher.server import create_app, guarded

GOOD = {"token_ids": [5, 6], "prompt_length": 1}  # one row to score


@asynccontextmanager
async def serving(folder: str, *, key: str | None = None, wait: bool = True, **options: object):  # type: ignore[no-untyped-def]
    """A client whose requests go straight into the guarded application."""
    app = create_app(TeacherConfig(model=folder, **options))  # type: ignore[arg-type]
    guard = guarded(app, key)
    async with app.router.lifespan_context(app):
        while wait and app.state.service.scorer is None:
            await asyncio.sleep(0.01)
        transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://teacher", trust_env=False) as client:
            client.app, client.guard = app, guard  # type: ignore[attr-defined]
            yield client


async def score(client: httpx.AsyncClient, body: object, **headers: str) -> httpx.Response:
    return await client.post("/v1/teacher/logprobs", json=body, headers=headers)
