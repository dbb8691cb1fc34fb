"""Reward functions that the tests of the workers import by name; each does one thing, right or wrong."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np


def length(completions: list[str]) -> list[float]:
    return [float(len(one)) for one in completions]


def process_id(completions: list[str], **_: Any) -> list[int]:
    time.sleep(0.05)
    return [os.getpid()] * len(completions)


def told(
    prompts: list[Any], completions: list[Any], level: list[int], trainer_state: Any, **others: Any
) -> list[float]:
    """What a call is told, in numbers that a test takes apart."""
    assert sorted(others) == ["completion_ids", "prompt_ids"], sorted(others)
    step, num_steps = trainer_state.step, trainer_state.num_steps
    assert (step, num_steps) == (trainer_state.global_step, trainer_state.max_steps)
    parts = zip(prompts, completions, level, others["prompt_ids"], others["completion_ids"], strict=True)
    return [
        len(str(p)) + 100 * len(c) + 10_000 * number + 1e6 * step + 1e8 * num_steps + len(i) / 8 + len(j) / 128
        for p, c, number, i, j in parts
    ]


async def slow_and_async(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0.5)
    return [1.0] * len(completions)


def returns_awaitable(completions: list[str], **_: Any) -> Any:
    return slow_and_async(completions)


def runs_a_loop_of_its_own(completions: list[str], **_: Any) -> list[float]:
    return asyncio.run(slow_and_async(completions))


def array(completions: list[str], **_: Any) -> Any:
    return np.arange(len(completions), dtype=np.float32)


def tensor(completions: list[str], **_: Any) -> Any:
    import torch  # which takes seconds, and the other functions need none

    return torch.arange(len(completions)) == 0


def scalars(completions: list[str], **_: Any) -> list[Any]:
    return [np.float32(0.5), np.array(True)]


def nothing_applies(completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def talks(completions: list[str], **_: Any) -> list[float]:
    print("x" * 300_000)
    sys.stdout.write('{"id": 1, "rewards": [9.0, 9.0]}\n')
    os.write(1, b"not an answer\n")
    return [float(len(sys.stdin.read()))] * len(completions)


def changes_its_process(completions: list[str], **_: Any) -> list[float]:
    """What it leaves behind does not reach the next call, or the trainer."""
    number = float(os.getcwd() == "/")
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    completions.clear()
    return [number] * 2


def raises(completions: list[str], **_: Any) -> list[float]:
    raise KeyError("two\nlines")


async def raises_late(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    raise ValueError("late")


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def raises_what_cannot_be_shown(completions: list[str], **_: Any) -> list[float]:
    raise _Unprintable


def leaves(completions: list[str], **_: Any) -> list[float]:
    sys.exit(3)


async def leaves_in_a_loop(completions: list[str], **_: Any) -> list[float]:
    sys.exit("enough")


def interrupts(completions: list[str], **_: Any) -> list[float]:
    raise KeyboardInterrupt


def kills_itself(completions: list[str], **_: Any) -> list[float]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def exits_at_once(completions: list[str], **_: Any) -> list[float]:
    os._exit(0)


def closes_everything(completions: list[str], **_: Any) -> list[float]:
    os.closerange(0, 64)
    time.sleep(60)
    return []


def hangs(completions: list[str], note: list[str], **_: Any) -> list[float]:
    """With a child, whose process id it writes down; neither ends at a SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        with open(note[0], "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    return []


async def hangs_in_a_loop(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(600)
    return []


def nan(completions: list[str], **_: Any) -> list[float]:
    return [1.0, float("nan")]


def infinite(completions: list[str], **_: Any) -> Any:
    return np.array([-np.inf, 0.0])


def huge(completions: list[str], **_: Any) -> list[Any]:
    return [0, 10**400]


def text(completions: list[str], **_: Any) -> list[Any]:
    return ["good", "bad"]


def too_many(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * 3


def one_number(completions: list[str], **_: Any) -> Any:
    return 1.0


def generator(completions: list[str], **_: Any) -> Any:
    return (1.0 for _ in completions)


def by_place(completions: list[str], /) -> list[float]:
    return []


not_a_function = 7
