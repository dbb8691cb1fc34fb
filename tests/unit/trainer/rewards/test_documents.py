"""What a reward function is given is what the row holds."""

import json
import math
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pytest

from trainer.rewards.documents import decode, encode


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 7, -0.5, 10**30, "é\n\ud800", [1, [2, {"a": None}]], {"x": {"y": []}}, {}),
        *(datetime(2026, 1, 2, 3, 4, 5, 6), datetime(2026, 1, 2, tzinfo=UTC), date(2026, 1, 2), time(3, 4, 5, 6)),
        *(timedelta(days=-1, microseconds=1), Decimal("1.10"), b"\0\xff", b"", [b"a", {"b": date(1, 1, 1)}]),
    ],
)
def test_a_value_comes_back_with_its_type(value: Any) -> None:
    line = encode({"arguments": {"column": [value]}})
    assert line.count(b"\n") == 1 and line.endswith(b"\n") and json.loads(line)
    (found,) = decode(line)["arguments"]["column"]
    assert found == value and type(found) is type(value)


def test_numbers_that_json_has_not_come_back() -> None:
    found = decode(encode({"x": [math.nan, math.inf]}))["x"]
    assert math.isnan(found[0]) and found[1] == math.inf


@pytest.mark.parametrize("value", [{1, 2}, object(), lambda: None])
def test_other_types_are_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=f"a {type(value).__name__} is neither JSON nor a date"):
        encode({"x": value})
