"""The live panel: what it reads while the trainer is writing, and what it shows."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from services.panel import last_step, render

ROW: dict[str, Any] = {
    "step": 30,
    "num_steps": 120,
    "step_s": 1.5,
    "single_step_kl": 0.123456,
    "reverse_kl_k1": -0.25,
    "loss": 1.5,
    "staleness": 0,
    "rollout_tokens_per_s": 12345.6,
    "teacher_tokens_per_s": 987.4,
    "trainer_tokens_per_s": 0.4,
}


ELAPSED_S = 3725.0


def shown(row: dict[str, Any], status: dict[str, str] | None = None) -> str:
    console = Console(record=True, width=140, force_terminal=False, file=io.StringIO())
    console.print(render(row, status or {}, ELAPSED_S))
    return console.export_text()


def step(number: int) -> str:
    return json.dumps({"step": number, "num_steps": 9})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (step(1) + "\n" + step(2) + "\n", 2),
        (step(1) + "\n" + step(2), 2),
        (step(1) + "\n" + step(2)[:7], 1),
        (step(1) + "\n" + step(2)[:-1], 1),
        (step(1) + "\n{", 1),
        (step(1) + "\n12", 1),
        (step(1) + '\n{"eval": "before", "accuracy": 0.5}\n', 1),
        (step(1) + "\n\n\n", 1),
        (step(1)[:9], None),
        ("", None),
        ("null\n[1]\n", None),
    ],
)
def test_the_last_complete_step_is_read(content: str, expected: int | None, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    assert last_step(path, since=0.0).get("step") == expected


def test_half_a_character_is_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(step(1).encode() + b'\n{"note": "\xc3')
    assert last_step(path, since=0.0)["step"] == 1


def test_before_the_first_step_there_is_nothing(tmp_path: Path) -> None:
    assert last_step(tmp_path / "metrics.jsonl", since=0.0) == {}
    assert last_step(tmp_path, since=0.0) == {}


def test_a_file_of_an_earlier_run_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(step(7))
    written = path.stat().st_mtime
    assert last_step(path, since=written + 1) == {}
    assert last_step(path, since=written - 1)["step"] == 7


def test_of_a_long_file_the_end_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(step(number) + "\n" for number in range(20_000)))
    assert path.stat().st_size > 4 * (64 << 10)
    assert last_step(path, since=0.0)["step"] == 19_999


def test_a_row_is_shown_with_its_numbers_and_the_time_left() -> None:
    text = shown(ROW, {"rollout": "ready", "teacher": "starting", "trainer": "ended"})
    for expected in (
        "step 30/120",
        "1:02:05 elapsed, 2:15 left",  # 90 steps of 1.5 s
        "reverse KL 0.1235",
        "k1 -0.2500",
        "loss 1.5000",
        "staleness 0",
        "rollout ready 12,346 tok/s",
        "teacher starting 987 tok/s",
        "trainer ended 0 tok/s",
    ):
        assert expected in text


def test_the_bar_grows_with_the_steps() -> None:
    full = [shown({**ROW, "step": number}).count("━") for number in (0, 30, 60, 120)]
    assert full == sorted(full) and full[0] < full[1] < full[2] < full[3]


def test_an_empty_row_shows_dashes_and_no_time() -> None:
    text = shown({})
    assert "step 0/?" in text and "left" not in text
    for expected in ("reverse KL -", "loss -", "rollout - - tok/s"):
        assert expected in text


@pytest.mark.parametrize("missing", ["single_step_kl", "reverse_kl_k1", "loss", "staleness"])
def test_a_metric_that_a_run_does_not_have_is_a_dash(missing: str) -> None:
    name = {"single_step_kl": "reverse KL", "reverse_kl_k1": "k1"}.get(missing, missing)
    for row in ({**ROW, missing: None}, {key: value for key, value in ROW.items() if key != missing}):
        assert re.search(rf"{name} -\s", shown(row))


def test_a_loss_that_is_not_a_number_is_shown_as_such() -> None:
    assert "loss nan" in shown({**ROW, "loss": float("nan")})


@pytest.mark.parametrize(("step_number", "expected"), [(119, "0:01 left"), (120, "0:00 left"), (1, "2:58 left")])
def test_time_left_is_steps_left_times_the_last_steps_time(step_number: int, expected: str) -> None:
    assert expected in shown({**ROW, "step": step_number})
