"""Teachers as they are after the preflight, over any client."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx

from services.clients import TeacherClient
from services.process.event_loop import EventLoopThread
from services.wire.teacher import TeacherInfo
from tests.scripted_teacher import INFO
from tests.teacher_app import serving
from trainer.evaluation.evaluate import Evaluation, Evaluator
from trainer.groups import Quarantined, Rollout, ScoredSample
from trainer.learner import Learner
from trainer.teacher_scores import Support, score_rollouts
from trainer.teachers import Teacher, Teachers


def attached(client: object, info: TeacherInfo = INFO, name: str | None = None) -> Teacher:
    return Teacher(name, client, info)  # type: ignore[arg-type]


class CallersLoop(EventLoopThread):
    """The event loop of an async test, for what is called in a thread beside it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def run(self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(function(*arguments), self._loop).result()


async def measured(evaluator: Evaluator, learner: Learner, version: int) -> Evaluation:
    """An evaluation, in a thread, by an evaluator in the caller's loop."""
    return await asyncio.to_thread(evaluator.evaluate, learner, version)


def alone(client: object, info: TeacherInfo = INFO) -> Teachers:
    """A run's only teacher."""
    return Teachers([attached(client, info)])


async def scored(
    teachers: Teachers, rollouts: list[Rollout], support: Support, temperature: float = 1.0
) -> tuple[list[ScoredSample], list[Quarantined]]:
    """What `score_rollouts` says of each rollout, the good ones apart from the others."""
    found = await score_rollouts(teachers, rollouts, support=support, temperature=temperature)
    return [s for s in found if isinstance(s, ScoredSample)], [q for q in found if isinstance(q, Quarantined)]


@asynccontextmanager
async def teacher_of(folder: str, name: str | None = None, **options: Any) -> AsyncIterator[Teacher]:
    """A real teacher in this process."""
    async with serving(folder, **options) as app:
        client = TeacherClient(["http://teacher"], transport=httpx.ASGITransport(app.guard))
        (info,) = await client.info()
        yield Teacher(name, client, info)
        await client.close()
