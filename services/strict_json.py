"""JSON of one meaning only, for whatever people or programs send: bodies, rows of files, run files.

Python's own reader takes NaN, lets the last of two equal keys win and guesses at UTF-16: what nobody meant must be neither
scored nor trained on.
"""

import codecs
import json
from typing import Any

from services.errors import DataError

_SHOWN_CHARACTERS = 80


class JsonError(ValueError):
    """The text is no JSON; says why."""


class DuplicateKeyError(JsonError):
    """An object gives a key twice; `key` is the first one's beginning."""

    def __init__(self, key: str) -> None:
        self.key = key[:_SHOWN_CHARACTERS]
        super().__init__(f"{self.key} is given twice in one object; give it once")


def parse_json(text: str | bytes) -> Any:
    """The value that a text, or its UTF-8, spells.

    Raises:
        JsonError: it spells none, or more than one: a DuplicateKeyError.
    """
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except JsonError:
        raise
    except RecursionError as error:
        raise JsonError("it is nested too deeply") from error
    except ValueError as error:  # not UTF-8, or more digits than Python converts, are others than JSONDecodeError
        raise JsonError(str(error)) from error


def parse_object(line: str | bytes) -> dict[str, Any]:
    """One row of JSON text.

    Raises:
        DataError: it is no JSON object, or gives a key twice.
    """
    try:
        content = parse_json(line)
    except JsonError as error:
        raise DataError(f"invalid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"expected a JSON object, got {type(content).__name__}")
    return content


def without_bom(content: bytes) -> bytes:
    """The bytes of a file without the mark that some editors put in front of UTF-8."""
    return content.removeprefix(codecs.BOM_UTF8)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise DuplicateKeyError(key)
        seen.add(key)
    raise AssertionError("fewer keys than pairs, but none twice")


def _refuse_constant(name: str) -> None:
    raise JsonError(f"{name} is no JSON number")
