"""Python's plain values as JSON and back, of the same types: tuples stay tuples, keys that are numbers stay numbers.

What is no plain value is refused, never pickled.
"""

import math
from collections import Counter
from typing import Any


class NotPlainError(ValueError):
    """A value that JSON cannot hold; says of which type."""


def to_json(value: Any) -> Any:
    """What `from_json` makes the same value of.

    >>> from_json(to_json({"betas": (0.9, 0.95), "milestones": {30: 1}}))
    {'betas': (0.9, 0.95), 'milestones': {30: 1}}

    Raises:
        NotPlainError: it is, or holds, something else than None, a truth value, a number, a text, a list, a tuple or a dict.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        # numpy's numbers are Python's as well
        return value if type(value) in (bool, int, float, str, type(None)) else _plain_number(value)
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [to_json(item) for item in value]}
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[to_json(key), to_json(item)] for key, item in value.items()]}
    raise NotPlainError(f"a {type(value).__name__}")


def from_json(value: Any) -> Any:
    """Inverse of `to_json`.

    Raises:
        NotPlainError: it is nothing that `to_json` makes.
    """
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, items = next(iter(value.items())) if len(value) == 1 else ("", None)
    if items is None:
        raise NotPlainError(f"a table with {sorted(value)}")
    if kind == "float":
        return float(items)
    if kind == "tuple":
        return tuple(from_json(item) for item in items)
    if kind == "dict":
        return {from_json(key): from_json(item) for key, item in items}
    if kind == "counter":
        return Counter({from_json(key): from_json(item) for key, item in items})
    raise NotPlainError(f"a table with {sorted(value)}")


def _plain_number(value: Any) -> bool | int | float | str:
    for kind in (float, int, str):
        if isinstance(value, kind):
            return kind(value)
    raise NotPlainError(f"a {type(value).__name__}")
