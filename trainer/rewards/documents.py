"""What crosses the pipes of a reward worker: lines of JSON. A column of the data may hold what JSON does not, dates for one: it
is written as text beside the name of its type."""

import base64
import json
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

_TYPE, _VALUE = "\0type", "\0value"  # names that no column has


def _exact(duration: timedelta) -> list[int]:
    return [duration.days, duration.seconds, duration.microseconds]


# datetime before date, of which it is a kind.
_KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "time": (time, time.isoformat, time.fromisoformat),
    "timedelta": (timedelta, _exact, lambda parts: timedelta(*parts)),
    "decimal": (Decimal, str, Decimal),
    "bytes": (bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
}


def encode(document: dict[str, Any]) -> bytes:
    """One line.

    Raises:
        TypeError: it holds a value of a type that cannot be written.
        ValueError: a list holds itself.
    """
    return json.dumps(document, default=_written).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The document of a line.

    Raises:
        ValueError: it is none.
    """
    found: dict[str, Any] = json.loads(line, object_hook=_read)
    return found


def _written(value: Any) -> dict[str, Any]:
    for name, (kind, write, _) in _KINDS.items():
        if isinstance(value, kind):
            return {_TYPE: name, _VALUE: write(value)}
    raise TypeError(f"a {type(value).__name__} is neither JSON nor a date, time, Decimal or bytes")


def _read(found: dict[str, Any]) -> Any:
    if found.keys() != {_TYPE, _VALUE}:
        return found
    return _KINDS[found[_TYPE]][2](found[_VALUE])
