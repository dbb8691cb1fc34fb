"""`make test` in its parts: what runs, and with which exit code it ends."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.__main__ import main


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    seen: list[list[str]] = []
    monkeypatch.setattr("subprocess.call", lambda words, **_: seen.append(words[3:]) or 0)
    yield seen


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0, 0), 0),
        ((1, 0, 0), 1),
        ((0, 0, 1), 1),
        ((1, 3), 1),
        ((0, 5, 5), 0),  # 5: no test of the selection is in that part
        ((5, 0, 5), 0),
        ((5, 5, 1), 1),
        ((5, 5, 5), 5),
        ((2,), 2),  # Ctrl-C: the next part does not begin
        ((0, 2), 2),
        ((4,), 4),
    ],
)
def test_the_exit_code_is_that_of_the_part_that_failed(
    codes: tuple[int, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(codes)
    monkeypatch.setattr("subprocess.call", lambda *_, **__: left.pop(0))
    assert main([]) == expected and left == []


def test_all_parts_get_the_arguments_and_what_measures_time_has_one_process(calls: Any) -> None:
    assert main(["-k", "batch"]) == 0
    (unit, servers, alone) = calls
    assert unit[:2] == ["--part", "unit"] and int(unit[unit.index("-n") + 1]) >= 2
    assert servers[:4] == ["--part", "servers", "-n", "2"]
    assert alone == ["--part", "alone", "-k", "batch"] and unit[-2:] == servers[-2:] == ["-k", "batch"]


@pytest.mark.parametrize("word", ["--pdb", "--collect-only", "--help"])
def test_a_debugger_and_what_runs_no_test_have_one_process(word: str, calls: Any) -> None:
    assert main([word]) == 0
    assert calls == [[word]]
