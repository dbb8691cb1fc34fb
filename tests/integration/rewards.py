"""Reward functions of the integration tests, right and wrong; imported by the processes of real runs."""

import time
from typing import Any


def sevens(completions: list[str], answer: list[str], trainer_state: Any, **_: Any) -> list[float]:
    """The share of sevens: what no teacher of addition writes, and any student soon does that is paid for it."""
    assert len(answer) == len(completions) and 1 <= trainer_state.step <= trainer_state.num_steps
    return [completion.count("7") / max(1, len(completion)) for completion in completions]


def _from_step_3(trainer_state: Any) -> bool:
    return bool(trainer_state.step >= 3)


def raises(completions: list[str], trainer_state: Any) -> list[float]:
    if _from_step_3(trainer_state):
        raise RuntimeError("the judge is out of office")
    return [1.0] * len(completions)


def hangs(completions: list[str], trainer_state: Any) -> list[float]:
    if _from_step_3(trainer_state):
        time.sleep(600)
    return [1.0] * len(completions)


def nan(completions: list[str], trainer_state: Any) -> list[float]:
    return [float("nan") if _from_step_3(trainer_state) else 1.0] * len(completions)


def wrong_length(completions: list[str], trainer_state: Any) -> list[float]:
    return [1.0] * (len(completions) + _from_step_3(trainer_state))


async def waits(completions: list[str], trainer_state: Any) -> list[float]:
    return [float(trainer_state.step)] * len(completions)
