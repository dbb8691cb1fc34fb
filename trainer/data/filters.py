"""Which rows are used, by the values of their columns: data.filters, whose form services/config/data_checks.py has checked.

    value or list           equals it, or one of them; null is also a column that is absent
    {"min": a, "max": b}    is a number from a to b
    {"not": value or list}  equals none of them

Columns of CSV files hold text alone: "3" equals 3, and is compared as 3.
"""

from collections.abc import Mapping
from typing import Any


def failed_filter(row: Mapping[str, Any], filters: Mapping[str, Any]) -> str | None:
    """The column of the first filter that leaves a row out, or None."""
    return next((column for column, condition in filters.items() if not _passes(row.get(column), condition)), None)


def _passes(value: Any, condition: Any) -> bool:
    if not isinstance(condition, dict):
        return _is_one_of(value, condition)
    number = _number(value)
    if "min" in condition and not (number is not None and number >= condition["min"]):  # also false for NaN
        return False
    if "max" in condition and not (number is not None and number <= condition["max"]):
        return False
    return "not" not in condition or not _is_one_of(value, condition["not"])


def _is_one_of(value: Any, wanted: Any) -> bool:
    return any(_equal(value, one) for one in (wanted if isinstance(wanted, list) else [wanted]))


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool) or isinstance(wanted, bool):  # True is 1 to Python
        return value is wanted or (isinstance(value, str) and value.lower() == str(wanted).lower())
    if isinstance(wanted, int | float) and isinstance(value, str):  # not by float alone: ids may have 20 digits
        return value == str(wanted) or _number(value) == wanted
    return bool(value == wanted)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
