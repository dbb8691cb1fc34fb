"""How every role logs: lines for people or JSON objects for machines, each with the id of the request it belongs to.

The environment decides: DISTILLSERVE_LOG_LEVEL (INFO), DISTILLSERVE_LOG_FORMAT (text or json).
"""

import json
import logging
import os
import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Self

from pythonjsonlogger.json import JsonFormatter

from services.errors import ConfigError

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""X-Request-ID of the request that this task answers; empty outside of one."""

FORMATS = ("text", "json")


def set_up_logging() -> None:
    """Log to stderr; of several ranks of a trainer, those behind the first one say warnings alone.

    Raises:
        ConfigError: the environment names a level or a format that there is not.
    """
    level = os.environ.get("DISTILLSERVE_LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(f"DISTILLSERVE_LOG_LEVEL = {level!r} must be DEBUG, INFO, WARNING, ERROR or CRITICAL")
    form = os.environ.get("DISTILLSERVE_LOG_FORMAT", "text").lower()
    if form not in FORMATS:
        raise ConfigError(f"DISTILLSERVE_LOG_FORMAT = {form!r} must be {' or '.join(FORMATS)}")
    handler = logging.StreamHandler()
    handler.addFilter(add_request_id)
    handler.setFormatter(json_formatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger().setLevel(max(logging.WARNING, logging.getLogger().level))
        logging.getLogger("vllm").setLevel(logging.ERROR)  # rank 0 has the same machine
    for client in ("httpx", "httpx2"):  # the second one is the model hub's
        logging.getLogger(client).setLevel(logging.WARNING)


def add_request_id(record: logging.LogRecord) -> bool:
    """A filter that drops nothing; a record that brings its own id, from another thread, keeps it."""
    if getattr(record, "request_id", None) is None:
        record.request_id = request_id.get()
    return True


class TextFormatter(logging.Formatter):
    """Time, level, logger and message, and the id of the request where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        of_request = getattr(record, "request_id", "")
        return f"{line} [{of_request}]" if of_request else line


@dataclass(frozen=True)
class LogLine:
    """A line that one of the two formatters wrote."""

    level: int
    logger: str
    message: str

    @classmethod
    def parse(cls, line: str) -> Self | None:
        """What a line of output says; None when it is no log line of ours."""
        if line.startswith("{"):
            return cls._parse_json(line)
        match = _TEXT_LINE.fullmatch(line)
        return None if match is None else cls(logging.getLevelNamesMapping()[match[1]], match[2], match[3])

    @classmethod
    def _parse_json(cls, line: str) -> Self | None:
        try:
            content = json.loads(line)
            level, said_by = logging.getLevelNamesMapping()[content["level"]], content["logger"]
            return cls(level, said_by, str(content["message"])) if isinstance(said_by, str) else None
        except (ValueError, KeyError, TypeError, RecursionError):  # an object of another program
            return None


_TEXT_LINE = re.compile(r"\d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR|CRITICAL) ([\w.]+): (.*)")


def json_formatter() -> logging.Formatter:
    """One object a line: timestamp, level, logger, message, request_id, and what the record brings along."""
    return JsonFormatter(
        "{levelname}{name}{message}",
        style="{",
        timestamp=True,
        rename_fields={"levelname": "level", "name": "logger"},
    )
