"""Functions as texts, and back in another process."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.config import RewardConfig
from services.errors import ConfigError
from tests.unit.trainer.rewards import functions
from tests.unit.trainer.rewards.test_pool import call
from trainer.rewards.pool import RewardPool
from trainer.rewards.reference import reference_of


class Graders:
    @staticmethod
    def strict(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completions[0]))] * len(completions)

    def bound(self, completions: list[str]) -> list[float]:
        return []


def nested() -> Any:
    def inner(completions: list[str]) -> list[float]:
        return []

    return inner


@functools.wraps(functions.length)
def replaced(completions: list[str]) -> list[float]:
    return []


async def test_what_a_function_is_called_finds_it_in_another_process() -> None:
    names = [reference_of(functions.length), reference_of(Graders.strict)]
    assert names[0] == "tests.unit.trainer.rewards.functions:length" and names[1].endswith(":Graders.strict")
    pool = RewardPool(RewardConfig(functions=names))
    try:
        await pool.start()
        assert await pool.call(call(0)) == [2.0, 4.0] and await pool.call(call(1)) == [2.0, 2.0]
    finally:
        await pool.close()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: [], "a lambda has no name .* write `def reward"),
        (nested(), "nested.<locals>.inner is defined inside nested, where another process does not find it; move it"),
        (functools.partial(functions.length), "an object of partial has no name .* call it in a function"),
        (replaced, "functions.length is another object than the function that was given"),
        (Graders().bound, "Graders.bound is another object"),
        (7, "must be a function, got an object of int"),
        ("m:f", "must be a function, got an object of str"),
    ],
)
def test_what_another_process_cannot_find_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reference_of(function)


SCRIPT = """
import asyncio
from services.config import RewardConfig
from trainer.rewards.pool import RewardCall, RewardPool
from trainer.rewards.reference import reference_of

FACTOR = 3

def times(completions, **kwargs):
    return [FACTOR * len(one) for one in completions]

async def run():
    pool = RewardPool(RewardConfig(functions=[reference_of(times)], num_workers=1))
    try:
        await pool.start()
        arguments = {"completions": ["a", "bc"], "trainer_state": {"step": 1, "num_steps": 1}}
        print(reference_of(times), await pool.call(RewardCall(0, arguments, 1, [0, 1])))
    finally:
        await pool.close()

if __name__ == "__main__":
    asyncio.run(run())
"""


@pytest.mark.parametrize("way", ["script", "module", "text"])
def test_functions_of_the_main_script_are_found_where_it_is_a_file(way: str, tmp_path: Path) -> None:
    file = tmp_path / "my_script.py"
    file.write_text(SCRIPT)
    words = {"script": [str(file)], "module": ["-m", "my_script"], "text": ["-c", SCRIPT]}[way]
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    if way == "text":
        assert "times is defined in a session that is no file of Python" in ended.stderr
        return
    expected = f"{file}:times" if way == "script" else "my_script:times"
    assert ended.stdout == f"{expected} [3.0, 6.0]\n", ended.stderr
