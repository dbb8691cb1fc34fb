"""Reward functions to start from; docs/rewards.md explains them, a test runs them."""

import asyncio
import re
from typing import Any


def is_short(completions: list[str], **kwargs: Any) -> list[float]:
    """Minus the characters beyond forty, in tens."""
    return [-max(0, len(completion) - 40) / 10 for completion in completions]


def is_right(completions: list[str], answer: list[str | None], **kwargs: Any) -> list[float | None]:
    """1 where the last number is the row's `answer`; a row without one is for other functions to judge."""
    rewards: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        numbers = re.findall(r"-?\d+", completion)
        rewards.append(None if expected is None else float(numbers[-1:] == [expected]))
    return rewards


def is_polite(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    """Of conversations, whose completions are lists of one message."""
    return [float("please" in messages[-1]["content"].lower()) for messages in completions]


async def is_liked(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
    """As a judge behind a network would be asked: all completions of the prompt at once."""

    async def ask(completion: str) -> float:
        await asyncio.sleep(0.01)  # here a request to the judge is awaited
        return float(len(set(completion)))

    return list(await asyncio.gather(*(ask(completion) for completion in completions)))
