"""What docs/rewards.md shows: its examples run, its options are those there are, its lines are those that are printed."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from services.config import LossConfig, RewardConfig, RunConfig
from services.errors import RewardError
from tests.unit.trainer.rewards.test_pool import pool_of
from trainer.rewards.of_groups import ARGUMENTS
from trainer.rewards.pool import RewardCall

DOCS = Path(__file__).parents[4] / "docs"
PAGE = (DOCS / "rewards.md").read_text()
EXAMPLES = DOCS / "examples" / "rewards.py"


def call(function: int, completions: list[Any], **columns: list[Any]) -> RewardCall:
    arguments = {
        "prompts": ["p"] * len(completions),
        "completions": completions,
        "trainer_state": {"step": 1, "num_steps": 1},
        **columns,
    }
    return RewardCall(function, arguments, 12, range(len(completions)))


async def test_the_examples_give_rewards() -> None:
    names = ["is_short", "is_right", "is_polite", "is_liked"]
    async with pool_of(*(f"{EXAMPLES}:{name}" for name in names)) as pool:
        assert await pool.call(call(0, ["a" * 50, "b"])) == [-1.0, 0.0]
        rights = await pool.call(call(1, ["it is 12", "13 or 12", "12.", "none"], answer=["12", "13", None, "1"]))
        assert rights == [1.0, 0.0, None, 0.0]
        polite = [[{"role": "assistant", "content": text}] for text in ("Please!", "no")]
        assert await pool.call(call(2, polite)) == [1.0, 0.0]
        assert await pool.call(call(3, ["aab", ""])) == [2.0, 0.0]


async def test_the_function_of_the_page_gives_rewards(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "page.py").write_text(source)
    async with pool_of(f"{tmp_path / 'page.py'}:is_right") as pool:
        assert await pool.call(call(0, [" 4 ", "5"], answer=["4", "4"])) == [1.0, 0.0]


def test_the_run_file_of_the_page_is_taken() -> None:
    (source,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    config = RunConfig.model_validate(tomllib.loads(source))
    assert config.learns_rewards and config.reward.models == ["org/a-reward-model"]


def test_the_page_names_every_option_and_argument() -> None:
    table = PAGE.split("## Options")[1]
    named = set(re.findall(r"`(\w+\.\w+)`", table))
    assert named >= {f"reward.{name}" for name in RewardConfig.model_fields}
    assert named <= {f"reward.{name}" for name in RewardConfig.model_fields} | {
        f"loss.{n}" for n in LossConfig.model_fields
    }
    assert all(f"`{argument}`" in PAGE for argument in ARGUMENTS)


async def test_a_line_of_the_page_is_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text("\n" * 5 + "def f(completions, **kwargs):\n    return {}['x']\n")
    async with pool_of("my_rewards:f") as pool:
        with pytest.raises(RewardError) as raised:
            await pool.call(call(0, ["a"] * 8))
    assert f"`{raised.value}`" in PAGE
