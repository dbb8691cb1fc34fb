"""The live panel: what it reads while the trainer is writing, and what it shows."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from services.launch.panel import Stage, clock, describe_step_time, last_evaluation, last_step, render

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


def shown(row: dict[str, Any], doing: dict[str, str] | None = None, evaluation: dict[str, Any] | None = None) -> str:
    console = Console(record=True, width=140, force_terminal=False, file=io.StringIO())
    stages = {role: Stage(what, since=100.0) for role, what in (doing or {}).items()}
    console.print(render(row, evaluation or {}, stages, ELAPSED_S, now=165.0))
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


def test_before_the_first_step_there_are_the_bar_and_the_roles_alone() -> None:
    lines = shown({}, {"rollout": "starting"}).splitlines()
    assert len(lines) == 2 and "step 0/?" in lines[0] and "left" not in lines[0]
    assert lines[1].strip() == "rollout starting for 1:05  teacher -  trainer -"


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


def test_a_role_without_a_speed_is_shown_with_how_long_it_takes() -> None:
    text = shown({}, {"rollout": "starting", "teacher": "ready"})
    assert "rollout starting for 1:05  teacher ready - tok/s" in text


def test_a_role_that_is_started_again_is_shown_with_that_and_not_with_the_speed_it_had() -> None:
    text = shown(ROW, {"rollout": "starting again (1 of 3)", "teacher": "ready", "trainer": "starting again (2 of 2)"})
    assert "rollout starting again (1 of 3) for 1:05  teacher ready 987 tok/s" in text
    assert "trainer starting again (2 of 2) for 1:05" in text


def test_several_servers_are_shown_each_and_their_speed_once() -> None:
    text = shown(ROW, {"rollout": "ready", "teacher": "ready", "rollout 2": "starting", "trainer": "training"})
    assert "rollout ready  rollout 2 starting for 1:05  rollout in all 12,346 tok/s  teacher ready 987 tok/s" in text
    before = shown({}, {"rollout": "ready", "rollout 2": "ready"})
    assert "rollout ready  rollout 2 ready  rollout in all - tok/s" in before


def test_a_rank_that_is_late_is_shown_beside_the_trainer() -> None:
    text = shown(ROW, {"trainer": "training", "trainer rank 1": "ending"})
    assert "trainer training 0 tok/s  trainer rank 1 ending for 1:05" in text and "in all" not in text


def test_the_last_evaluation_is_found_among_the_rows_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    evaluations = [{"step": n, "eval_reverse_kl": n / 100, "eval_exact_match": n / 1000} for n in (0, 100)]
    path.write_text(
        "\n".join([json.dumps(evaluations[0]), step(1), json.dumps(evaluations[1]), step(101), '{"step": 102'])
    )
    found = last_evaluation(path, since=0.0)
    assert found == evaluations[1] and last_step(path, since=0.0)["step"] == 101
    assert "held-out after step 100  exact match 10.0%  reverse KL 1.0000" in shown(ROW, evaluation=found)
    assert "held-out" not in shown(ROW)
    without_answers = {"step": 0, "eval_reverse_kl": 1.5}
    assert "exact match -  reverse KL 1.5000" in shown(ROW, evaluation=without_answers)


def test_how_completions_end_is_shown() -> None:
    ends = {"ended_by_<|im_end|>_fraction": 0.74, "ended_by_[E]_fraction": 0.01}
    text = shown(ROW | {"completion_tokens": 12.34, "truncated_fraction": 0.25} | ends)
    assert "completion 12.3 tokens  truncated 25%  ended by 74% <|im_end|>, 1% [E]" in text
    assert "completion - tokens  truncated -  ended by -" in shown(ROW)


def test_where_the_time_of_a_step_goes() -> None:
    times = {"step_s": 31.26, "rollout_s": 8.84, "teacher_s": 0.026, "train_s": 12.3, "push_s": 7.5, "canary_s": 3.5}
    expected = "31 s a step (rollout 8.84, teacher 0.03, train 12, push 7.50, canary 3.50)"
    assert describe_step_time(times) == expected and expected in shown(ROW | times)
    assert describe_step_time({"step_s": 2.0}) == "2.00 s a step"


@pytest.mark.parametrize(("seconds", "text"), [(5.9, "0:05"), (65.0, "1:05"), (3725.0, "1:02:05")])
def test_a_duration_is_shown_as_a_clock_would(seconds: float, text: str) -> None:
    assert clock(seconds) == text
