"""Lines of log: for people, for machines, and with the id of the request that they belong to."""

import asyncio
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from services import logs
from services.errors import ConfigError


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("services.teacher").makeRecord("a.b", logging.INFO, "f", 1, message, (), None, extra=extra)
    assert logs.add_request_id(made)
    return made


@pytest.fixture(autouse=True)
def plain_records() -> Iterator[None]:
    """Records without what vLLM adds to those of its processes, once a test has imported it."""
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)
    yield
    logging.setLogRecordFactory(before)


async def test_a_record_has_the_id_of_the_request_that_is_answered() -> None:
    async def answer(given: str) -> str:
        logs.request_id.set(given)
        await asyncio.sleep(0)
        return logs.TextFormatter().format(record("scored"))

    lines = await asyncio.gather(answer("one"), answer("two"))
    assert [line.split("a.b: ")[1] for line in lines] == ["scored [one]", "scored [two]"]
    assert logs.TextFormatter().format(record("scored")).endswith("a.b: scored")  # outside of a request


def test_a_record_of_another_thread_keeps_its_own_id() -> None:
    assert vars(record("scored", request_id="mine"))["request_id"] == "mine"


def test_json_has_the_fields_and_the_traceback_in_one_line() -> None:
    made = record("scored\nit", request_id="r", status=200)
    try:
        raise ValueError("no")
    except ValueError:
        made.exc_info = sys.exc_info()
    line = logs.json_formatter().format(made)
    content = json.loads(line)
    assert "\n" not in line and "ValueError: no" in content.pop("exc_info") and content.pop("timestamp")
    assert content == {"level": "INFO", "logger": "a.b", "message": "scored\nit", "request_id": "r", "status": 200}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("DISTILLSERVE_LOG_LEVEL", "loud", "'LOUD' must be DEBUG"), ("DISTILLSERVE_LOG_FORMAT", "xml", "text or json")],
)
def test_what_cannot_be_logged_is_refused(name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} = .*{says}"):
        logs.set_up_logging()
