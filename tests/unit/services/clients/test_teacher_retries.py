"""How often a teacher on a real port is asked, and after which waits; see test_teacher_client for replicas and outages."""

from collections.abc import Iterator

import pytest

from services.clients import TeacherClient
from services.errors import ProblemError
from tests.scripted_teacher import ScriptedTeacher

SEQUENCES = [([1, 2, 3], 1), ([4, 5], 1)]
CLOSED = 0


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    with ScriptedTeacher().serving() as teacher:
        yield teacher


def refuse(teacher: ScriptedTeacher, status: int, times: int) -> None:
    refusals = iter([(status, {"detail": "not now"})] * times)
    teacher.refuse = lambda body: next(refusals, None)


@pytest.mark.parametrize("status", [CLOSED, 408, 429, 500, 502, 503, 504, 599])
async def test_what_may_pass_is_asked_again_after_jittered_waits(
    status: int, teacher: ScriptedTeacher, waits: list[float]
) -> None:
    refuse(teacher, status, times=2)
    async with TeacherClient([teacher.url]) as client:
        scores = await client.score(SEQUENCES, top_k=1)
    assert scores.token_ids.tolist() == [2, 3, 5] and len(teacher.bodies) == 3
    assert teacher.bodies[0] == teacher.bodies[1] == teacher.bodies[2]
    assert 0.2 <= waits[0] <= 1.2 and 0.4 <= waits[1] <= 1.4 and waits[1] - waits[0] != pytest.approx(0.2)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_retry_after_is_waited_for_with_a_little_jitter(
    status: int, teacher: ScriptedTeacher, waits: list[float]
) -> None:
    refuse(teacher, status, times=1)
    teacher.headers = {"Retry-After": "20"}
    async with TeacherClient([teacher.url]) as client:
        await client.score(SEQUENCES, top_k=1)
    assert len(teacher.bodies) == 2
    assert len(waits) == 1 and 19.5 < waits[0] <= 25 and waits[0] != pytest.approx(20, abs=1e-6)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 410, 413, 415, 422, 431, 451])
async def test_what_will_not_pass_is_asked_once(status: int, teacher: ScriptedTeacher, waits: list[float]) -> None:
    refuse(teacher, status, times=9)
    teacher.headers = {"Retry-After": "1"}
    async with TeacherClient([teacher.url]) as client:
        with pytest.raises(ProblemError, match=f"answered {status}: not now"):
            await client.score(SEQUENCES[:1], top_k=1)
    assert len(teacher.bodies) == 1 and waits == []
