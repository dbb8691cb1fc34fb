"""What the teacher's log says of an answered request."""

import logging
from collections.abc import Callable

import pytest

from services.config import TeacherConfig
from services.http.metrics import TeacherMetrics
from services.teacher.api.answer_log import SCORED, AnswerLog
from tests.teacher_app import GOOD, score, serving


def scope(path: bytes = b"/v1/x", **more: object) -> dict[str, object]:
    return {"method": "POST", "raw_path": path, "query_string": b"key=secret", "client": ("10.0.0.9", 5), **more}


def lines(caplog: pytest.LogCaptureFixture, status: int, *, access_log: bool, given: dict[str, object]) -> list[str]:
    caplog.set_level(logging.INFO, logger="services.teacher.api.answer_log")
    AnswerLog(TeacherConfig(access_log=access_log), TeacherMetrics())(given, status, 0.01234)
    return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]


def test_a_line_says_who_asked_what_and_how_it_went(caplog: pytest.LogCaptureFixture) -> None:
    given = scope(**{SCORED: {"sequences": 2, "rows": 30}})
    expected = "INFO method=POST path=/v1/x status=200 duration_ms=12.3 client=10.0.0.9 sequences=2 rows=30"
    assert lines(caplog, 200, access_log=True, given=given) == [expected]
    fields = vars(caplog.records[0])
    assert (fields["status"], fields["rows"]) == (200, 30)


@pytest.mark.parametrize(("status", "level"), [(200, None), (404, "INFO"), (429, "INFO"), (500, "WARNING")])
def test_without_access_log_only_refusals_and_failures_are_said(
    status: int, level: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    said = lines(caplog, status, access_log=False, given=scope())
    assert [line.split()[0] for line in said] == ([] if level is None else [level])


def test_no_path_writes_a_line_of_its_own_and_no_query_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = lines(caplog, 404, access_log=True, given=scope(b"/a%0aINFO forged\xff" + b"x" * 500))
    assert "\n" not in line and "secret" not in line and len(line) < 320


async def test_a_scored_request_is_one_line_with_its_id_and_health_is_none(
    tiny_model_folder: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="services.teacher.api.answer_log")
    async with serving(tiny_model_folder("qwen3"), key="a-secret-key", access_log=True) as client:
        await client.get("/health")
        headers = {"Authorization": "Bearer a-secret-key", "X-Request-ID": "mine-1"}
        await score(client, {"sequences": [GOOD, GOOD], "top_k": 1}, **headers)
        await score(client, {"sequences": [GOOD]}, Authorization="Bearer another-key")
    first, second = (record.getMessage() for record in caplog.records)
    assert "path=/v1/teacher/logprobs status=200" in first and "sequences=2 rows=2" in first
    assert "status=401" in second and "key" not in first + second
