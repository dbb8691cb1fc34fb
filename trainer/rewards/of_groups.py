"""Groups of completions to their rewards: what functions are told, and when.

consumes   PromptGroup with its rollouts
produces   the same with rewards; a function sees all completions of a prompt at once, and no others
waits for  the processes of pool.py
"""

import time
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase

from services.clients.base import all_or_first_error
from services.config import RunConfig
from services.errors import ConfigError
from trainer.data.prompts import Prompt
from trainer.groups import PromptGroup
from trainer.rewards.pool import RewardCall, RewardPool

ARGUMENTS = ("prompts", "completions", "prompt_ids", "completion_ids", "trainer_state")
"""Keyword arguments of every call, besides the columns of the row."""


class GroupRewards:
    """Calls every reward function on every group.

    Args:
        pool: has started.
        tokenizer: of the student.
        columns: names that rows of the data have, besides those of the prompt; a row without one of them has None there.

    Attributes:
        busy_s: seconds in which rewards were waited for, of all groups so far.
    """

    def __init__(
        self,
        config: RunConfig,
        pool: RewardPool,
        tokenizer: PreTrainedTokenizerBase,
        num_steps: int,
        columns: Collection[str],
    ) -> None:
        self._config, self._pool, self._tokenizer, self._num_steps = config, pool, tokenizer, num_steps
        self._columns = sorted(columns)
        self.busy_s = 0.0

    async def fill_in(self, groups: list[PromptGroup], step: int) -> None:
        """Ask for the rewards of each group.

        Args:
            step: whose batch they are for.

        Raises:
            RewardError: a function failed.
        """
        started = time.monotonic()
        asked = [group for group in groups if group.rollouts]
        functions = range(len(self._config.reward.functions))
        calls = [call for group in asked for call in self._calls(group, functions, step)]
        answers = iter(await all_or_first_error([self._pool.call(call) for call in calls]))
        for group in asked:
            group.rewards = list(zip(*(next(answers) for _ in functions), strict=True))
        self.busy_s += time.monotonic() - started

    def _calls(self, group: PromptGroup, functions: range, step: int) -> list[RewardCall]:
        arguments = self._arguments(group, step)
        samples = [rollout.completion.sample_index for rollout in group.rollouts]
        return [RewardCall(index, arguments, group.prompt.row, samples) for index in functions]

    def _arguments(self, group: PromptGroup, step: int) -> dict[str, Any]:
        """Keyword arguments: lists with a value for each completion, but for `trainer_state`."""
        prompt, count = group.prompt, len(group.rollouts)
        rows = [columns_of(rollout.prompt, self._config) for rollout in group.rollouts]
        # A rollout function may add to those of the data, a value for each completion.
        names = {*self._columns, *(name for row in rows for name in row)}
        completion_ids = [rollout.completion.token_ids.tolist() for rollout in group.rollouts]
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]
        is_chat = prompt.messages is not None
        return {
            **{name: [row.get(name) for row in rows] for name in sorted(names)},
            "prompts": [prompt.messages if is_chat else prompt.text] * count,
            "completions": [[{"role": "assistant", "content": text}] for text in texts] if is_chat else texts,
            "prompt_ids": [rollout.prompt.token_ids for rollout in group.rollouts],
            "completion_ids": completion_ids,
            "trainer_state": {"step": step, "num_steps": self._num_steps},
        }


def check_arguments(
    functions: list[str], required: list[list[str]], columns: Collection[str], *, may_come: bool = False
) -> None:
    """Refuse functions that cannot be called on rows with these columns.

    Args:
        may_come: whether a rollout function may give further columns.
        required: of each function the keyword arguments without which it cannot be called.

    Raises:
        ConfigError: a function asks for what nobody gives it, or a column has the name of an argument.
    """
    if taken := sorted(set(columns) & set(ARGUMENTS)):
        raise ConfigError(
            f"the data have a column `{taken[0]}`, which is the name of an argument of reward functions; rename the column"
        )
    known = [*ARGUMENTS, *sorted(columns)]
    for function, names in zip(functions, required, strict=True):
        if not may_come and (unknown := [name for name in names if name not in known]):
            raise ConfigError(
                f"reward.functions: {function} asks for `{unknown[0]}`, but is given {', '.join(known)}; name a column of the "
                "data, or give the parameter a default"
            )


def columns_of(prompt: Prompt, config: RunConfig) -> dict[str, Any]:
    """The columns of a row that functions are given: all but the prompt's, the reference answer and the teacher's name
    included."""
    of_row = dict(prompt.columns)
    if prompt.answer is not None:
        of_row[config.data.answer_column] = prompt.answer
    if prompt.teacher is not None:
        of_row[config.data.teacher_column] = prompt.teacher
    return of_row
