"""What a run says of itself while it goes on."""

import logging
import time

import pytest

from trainer.output import progress as progress_module
from trainer.output.progress import Progress, describe_steps

TIMES = {"step_s": 2.0, "rollout_s": 1.0, "teacher_s": 0.5, "train_s": 0.25, "push_s": 0.125, "canary_s": 0.1}
ROW = {"step": 30, "num_steps": 90, "loss": -1.5, "single_step_kl": 0.25, "completion_tokens": 12.34, **TIMES}


def test_steps_are_told_by_the_last_one_with_the_mean_of_their_times() -> None:
    rows = [ROW, ROW | {"step": 31, "loss": 0.5, "step_s": 4.0}]
    expected = (
        "step 31/90: loss 0.5000, reverse KL 0.2500, exact match 0.917 (step 20), 12.3 tokens a completion, "
        "3.00 s a step (rollout 1.00, teacher 0.50, train 0.25, push 0.12, canary 0.10), 2:57 left"
    )
    assert describe_steps(rows, "exact match 0.917 (step 20)") == expected


def test_a_number_that_a_run_does_not_have_is_left_out() -> None:
    row = {name: value for name, value in ROW.items() if name != "single_step_kl"}
    assert describe_steps([row]).startswith("step 30/90: loss -1.5000, 12.3 tokens a completion, 2.00 s a step (")


def said(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    deadline = time.monotonic() + 20
    while len(caplog.messages) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return caplog.messages[:count]


def test_it_is_never_silent_for_long(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "_POLL_S", 0.01)
    caplog.set_level(logging.INFO, "trainer.output.progress")
    with Progress(interval_s=0.05) as progress:
        with progress.doing("loading the student"):
            assert said(caplog, 1) == ["loading the student, 0:00 so far"]
        caplog.clear()
        assert said(caplog, 1) == ["training, 0:00 so far"]
        progress.step(ROW)
        while not any(line.startswith("step 30/90: loss") for line in caplog.messages):
            time.sleep(0.01)
        caplog.clear()
        assert said(caplog, 1) == ["step 31/90 is under way, 0:00 so far"]
        caplog.clear()
        with progress.doing("evaluating"):
            while "evaluating, 0:00 so far" not in caplog.messages:
                time.sleep(0.01)
    caplog.clear()
    time.sleep(0.2)
    assert caplog.messages == []  # its thread has ended


def test_an_evaluation_is_said_at_once_and_remembered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trainer.output.progress")
    with Progress(interval_s=0.05) as progress:
        progress.evaluated(20, 0.9166, 0.123456)
        progress.step(ROW)
        progress.step(ROW)
        lines = said(caplog, 2)
        assert lines[0] == "step 20: held-out exact match 0.917, reverse KL 0.1235"
        assert "exact match 0.917 (step 20), 12.3 tokens" in lines[1]
        progress.evaluated(30, None, 0.5)
        assert "step 30: held-out reverse KL 0.5000" in caplog.messages


def test_who_has_just_spoken_waits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trainer.output.progress")
    with Progress(interval_s=60.0) as progress:
        progress.evaluated(0, None, 1.0)
        time.sleep(0.7)  # longer than it sleeps between two looks
        assert len(caplog.messages) == 1


def test_the_last_step_is_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trainer.output.progress")
    progress = Progress()
    progress.step(ROW | {"step": 89})
    assert caplog.messages == []
    progress.step(ROW | {"step": 90})
    assert [line.split(":")[0] for line in caplog.messages] == ["step 90/90"]
