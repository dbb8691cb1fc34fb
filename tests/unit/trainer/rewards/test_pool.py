"""Reward functions in real processes: what they return, how they fail, and that nothing of them is left."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.config import RewardConfig
from services.errors import ConfigError, RewardError
from trainer.rewards.pool import RewardCall, RewardPool

HERE = "tests.unit.trainer.rewards.functions"
ARGUMENTS = {
    "prompts": ["p", "p"],
    "completions": ["ab", "abcd"],
    "prompt_ids": [[1], [1]],
    "completion_ids": [[2], [2, 3, 4]],
    "trainer_state": {"step": 3, "num_steps": 9},
}


@asynccontextmanager
async def pool_of(*functions: str, **options: Any) -> AsyncIterator[RewardPool]:
    names = [one if ":" in one else f"{HERE}:{one}" for one in functions]
    pool = RewardPool(RewardConfig(functions=names, **{"num_workers": 1, "timeout_s": 30.0} | options))
    try:
        await pool.start()
        yield pool
    finally:
        await pool.close()


def call(function: int = 0, row: int = 7, **columns: Any) -> RewardCall:
    return RewardCall(function, ARGUMENTS | columns, row, [0, 2])


def is_running(process: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_function_gets_what_it_asks_for_by_name() -> None:
    async with pool_of("length", "told") as pool:
        assert await pool.call(call(0)) == [2.0, 4.0]
        given = [1 + 100 * count + 10_000 * 5 + 3e6 + 9e8 + 1 / 8 for count in (2, 4)]
        assert await pool.call(call(1, level=[5, 5])) == [given[0] + 1 / 128, given[1] + 3 / 128]
        assert pool.required == [["completions"], ["prompts", "completions", "level", "trainer_state"]]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("array", [0.0, 1.0]),
        ("tensor", [1.0, 0.0]),
        ("scalars", [0.5, 1.0]),
        ("nothing_applies", [None, None]),
        ("talks", [0.0, 0.0]),
        ("returns_awaitable", [1.0, 1.0]),
        ("runs_a_loop_of_its_own", [1.0, 1.0]),
    ],
)
async def test_whatever_holds_numbers_is_taken(function: str, expected: list[float | None]) -> None:
    async with pool_of(function) as pool:
        assert await pool.call(call()) == expected


async def test_what_a_call_does_to_its_process_does_not_reach_the_next_one() -> None:
    here = os.getcwd()
    async with pool_of("changes_its_process") as pool:
        assert [await pool.call(call()) for _ in range(2)] == [[0.0, 0.0], [0.0, 0.0]]
    assert os.getcwd() == here


async def test_calls_are_shared_out_over_the_processes() -> None:
    async with pool_of("process_id", num_workers=2) as pool:
        answers = await asyncio.gather(*(pool.call(call()) for _ in range(6)))
        assert len({answer[0] for answer in answers}) == 2
        assert len({answer[0] for answer in [await pool.call(call()) for _ in range(3)]}) == 1


async def test_calls_of_async_functions_overlap() -> None:
    async with pool_of("slow_and_async", "length") as pool:
        started = time.monotonic()
        answers = await asyncio.gather(*(pool.call(call()) for _ in range(20)))
        assert answers == [[1.0, 1.0]] * 20 and time.monotonic() - started < 5.0  # one by one: 10 s
        assert await pool.call(call(1)) == [2.0, 4.0]


OF_ROW = "for the 2 completions of row 7"
WRONG = {
    "raises": rf"raised KeyError: 'two\\nlines' \(functions.py, line \d+\) {OF_ROW}",
    "raises_late": rf"raised ValueError: late \(functions.py, line \d+\) {OF_ROW}",
    "raises_what_cannot_be_shown": rf"raised _Unprintable \(functions.py, line \d+\) {OF_ROW}",
    "leaves": rf"called sys.exit\(3\) \(functions.py, line \d+\) {OF_ROW}",
    "leaves_in_a_loop": rf"called sys.exit\(enough\) \(functions.py, line \d+\) {OF_ROW}",
    "interrupts": rf"raised KeyboardInterrupt \(functions.py, line \d+\) {OF_ROW}",
    "kills_itself": f": its process was ended by SIGKILL when it was called {OF_ROW}",
    "exits_at_once": f": its process ended with exit code 0 when it was called {OF_ROW}",
    "closes_everything": f": its process closed its pipe when it was called {OF_ROW}",
    "nan": r"gave nan \(float\) to sample 2 of row 7; a reward is a finite number",
    "infinite": r"gave -inf \(float\) to sample 0 of row 7",
    "huge": r"gave 10{296}\.\.\. \(int\) to sample 2 of row 7",
    "text": r"gave 'good' \(str\) to sample 0 of row 7",
    "too_many": f"returned 3 rewards {OF_ROW}",
    "one_number": rf"returned 1.0 \(float\), which is no list of rewards {OF_ROW}",
    "generator": r"returned <generator .*> \(generator\), which is no list of rewards",
}


@pytest.mark.parametrize(("function", "message"), WRONG.items())
async def test_what_goes_wrong_is_one_line_with_function_and_row(function: str, message: str) -> None:
    async with pool_of(function) as pool:
        with pytest.raises(RewardError, match=rf"^reward.functions: {HERE}:{function}:? ?{message}") as raised:
            await pool.call(call())
        assert "\n" not in str(raised.value) and raised.value.exit_code == 9


async def test_at_the_deadline_a_process_and_its_children_are_killed_and_the_next_call_has_another(
    tmp_path: Path,
) -> None:
    note = tmp_path / "processes"
    async with pool_of("hangs", "length", timeout_s=1.0) as pool:
        with pytest.raises(RewardError, match=rf":hangs has not answered within reward.timeout_s = 1 s {OF_ROW}; make"):
            await pool.call(call(note=[str(note), ""]))
        processes = [int(word) for word in note.read_text().split()]
        assert len(processes) == 2
        await until(lambda: not any(map(is_running, processes)))
        assert await pool.call(call(1)) == [2.0, 4.0]


async def test_an_async_function_that_hangs_is_named_although_others_lose_their_process() -> None:
    async with pool_of("hangs_in_a_loop", "slow_and_async", timeout_s=1.0) as pool:
        hanging = [pool.call(call(row=row)) for row in (7, 8, 9)]
        results = await asyncio.gather(*hanging, return_exceptions=True)
        assert isinstance(results[0], RewardError) and "has not answered within" in str(results[0])
        assert await pool.call(call(1)) == [1.0, 1.0]


async def test_a_process_that_ended_between_calls_is_replaced() -> None:
    async with pool_of("process_id") as pool:
        (first, _) = await pool.call(call())
        assert first is not None
        os.kill(int(first), 9)
        await until(lambda: not is_running(int(first)))
        await asyncio.sleep(0.1)
        assert (await pool.call(call()))[0] != first


async def test_a_call_that_is_given_up_leaves_no_process_and_close_neither(tmp_path: Path) -> None:
    note = tmp_path / "processes"
    async with pool_of("hangs", "process_id", num_workers=2) as pool:
        (idle, _) = await pool.call(call(1))
        giving_up = asyncio.create_task(pool.call(call(note=[str(note), ""])))
        await until(lambda: note.exists() and len(note.read_text().split()) == 2)
        giving_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await giving_up
    assert not any(map(is_running, [int(idle or 0), *map(int, note.read_text().split())]))


async def test_columns_that_no_other_process_can_be_given_are_said() -> None:
    async with pool_of("length") as pool:
        with pytest.raises(
            RewardError, match=r":length cannot be given the columns of row 7: a function is neither JSON"
        ):
            await pool.call(call(level=[lambda: None, 1]))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "no_such_module:f",
            r"functions\[0\] = 'no_such_module:f' cannot be loaded: ModuleNotFoundError: No module named",
        ),
        (f"{HERE}:lenght", r"cannot be loaded: AttributeError: module .* has no attribute 'lenght'"),
        (f"{HERE}:not_a_function", r"TypeError: not_a_function is no function but of type int; a function is given as"),
        (f"{HERE}:by_place", r"takes `completions` by its place alone"),
        ("nowhere/rewards.py:f", r"FileNotFoundError: there is no file nowhere/rewards.py"),
        ("a/b:c/d", r"reward.functions\[0\] = 'a/b:c/d' is no model folder .* given as \"module:function\""),
    ],
)
async def test_a_function_that_cannot_be_imported_is_said_at_the_start(function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        async with pool_of(function):
            pass


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys; sys.exit(4)", r"its module calls sys.exit\(4\)"),
        ("import os; os.kill(os.getpid(), 9)", "the process that imports it was ended by SIGKILL"),
        ("def f(:", "SyntaxError"),
        ("import time; time.sleep(60)", r"it takes more than reward.startup_timeout_s = 2 s; raise that"),
        (
            "from trainer.rewards.process import refuse_in_worker\nrefuse_in_worker()",
            'a script that holds reward functions .* under `if __name__ == "__main__":`',
        ),
    ],
)
async def test_a_module_that_does_not_survive_its_import_is_named(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(source)
    functions = [f"{HERE}:length", f"{tmp_path / 'bad.py'}:f"]
    with pytest.raises(ConfigError, match=rf"reward.functions\[1\] = '.*bad.py:f' cannot be loaded: .*{message}"):
        async with pool_of(*functions, startup_timeout_s=2.0 if "sleep" in source else 60.0):
            pass


async def test_a_module_beside_the_run_is_found_and_standard_modules_are_not_shadowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text("import beside\ndef f(completions):\n    return [beside.N] * len(completions)\n")
    Path("beside.py").write_text("N = 5\n")
    Path("json.py").write_text("raise RuntimeError('the wrong module')\n")
    Path("trainer.py").write_text("raise RuntimeError('the wrong module')\n")
    async with pool_of("my_rewards:f", "my_rewards.py:f") as pool:
        assert await pool.call(call()) == [5.0, 5.0] == await pool.call(call(1))
