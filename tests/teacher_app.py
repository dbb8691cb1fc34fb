"""The teacher's guarded application in this process, without a port."""

import asyncio
from contextlib import asynccontextmanager

import httpx

from services.config import TeacherConfig
from services.guard import OPEN_PATHS, Guard
from services.teacher.server import create_app

GOOD = {"token_ids": [5, 6], "prompt_length": 1}  # one row to score


@asynccontextmanager
async def serving(
    folder: str, *, key: str | None = None, max_body: int = 1 << 20, wait: bool = True, **options: object
):  # type: ignore[no-untyped-def]
    """A client whose requests go straight into the guarded application."""
    app = create_app(TeacherConfig(model=folder, **options))  # type: ignore[arg-type]
    guard = Guard(app, key=key, open_paths=OPEN_PATHS, max_body_bytes=max_body)
    async with app.router.lifespan_context(app):
        while wait and app.state.service.scorer is None:
            await asyncio.sleep(0.01)
        transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://teacher") as client:
            client.app, client.guard = app, guard  # type: ignore[attr-defined]
            yield client


async def score(client: httpx.AsyncClient, body: object, **headers: str) -> httpx.Response:
    return await client.post("/v1/teacher/logprobs", json=body, headers=headers)
