"""What functions are told of a group, and whose reward each number is."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from services.config import RunConfig
from services.errors import ConfigError, RewardError
from tests.unit.trainer.samples import SAMPLES
from trainer import scoring
from trainer.groups import PromptGroup, Quarantined, Rollout
from trainer.rewards.of_groups import GroupRewards, check_arguments
from trainer.rewards.pool import RewardCall
from trainer.scoring import Scoring
from trainer.teacher_scores import Support
from trainer.teachers import Teachers
from trainer.tiny.pair import build_tokenizer

CONFIG = RunConfig(
    reward={"functions": ["m:first", "m:second"], "advantage": "raw"},
    data={"answer_column": "solution"},
    teacher_client={"named": {"maths": ["http://a:1"]}},
)
CHAT = [{"role": "user", "content": "1+1"}]


class Pool:
    """Answers with the lengths of the completions, or with the row's number, and writes calls down."""

    def __init__(self) -> None:
        self.calls: list[RewardCall] = []

    async def call(self, call: RewardCall) -> list[float | None]:
        self.calls.append(call)
        await asyncio.sleep(0.01 * (5 - call.row))  # the first asked is the last to answer
        if call.function:
            return [float(call.row)] * len(call.samples)
        return [None if len(ids) == 1 else float(len(ids)) for ids in call.arguments["completion_ids"]]


def rewards_of(pool: Any, *columns: str) -> GroupRewards:
    return GroupRewards(CONFIG, pool, build_tokenizer(), 9, columns)


def group(place: int, *samples: int, **of_prompt: Any) -> PromptGroup:
    prompt = replace(SAMPLES[samples[0]].rollout.prompt, row=place + 1, **of_prompt)
    rollouts = []
    for number, index in enumerate(samples):
        completion = replace(SAMPLES[index].rollout.completion, sample_index=number + 1)
        rollouts.append(Rollout(prompt, completion, 0))
    return PromptGroup(place, prompt, rollouts)


async def test_each_group_has_the_rewards_of_its_own_completions_by_function() -> None:
    groups = [group(0, 0, 1), replace(group(1, 2), rollouts=[]), group(2, 3)]
    rewards = rewards_of(Pool())
    await rewards.fill_in(groups, 4)
    assert groups[0].rewards == [(5.0, 1.0), (None, 1.0)] and groups[2].rewards == [(9.0, 3.0)]
    assert groups[1].rewards == [] and 0.02 < rewards.busy_s < 60


async def test_a_function_is_told_texts_ids_columns_and_where_the_run_is() -> None:
    pool = Pool()
    one = group(0, 0, 1, text="p", answer="2", columns={"level": [3]}, teacher="maths")
    await rewards_of(pool, "level", "other", "solution", "teacher").fill_in([one], 4)
    tokenizer = build_tokenizer()
    ids = [rollout.completion.token_ids.tolist() for rollout in one.rollouts]
    assert pool.calls[0].samples == [1, 2] and pool.calls[0].row == 1
    assert pool.calls[0].arguments == {
        "prompts": ["p", "p"],
        "completions": [tokenizer.decode(part, skip_special_tokens=True) for part in ids],
        "prompt_ids": [one.prompt.token_ids] * 2,
        "completion_ids": ids,
        "trainer_state": {"step": 4, "num_steps": 9},
        "level": [[3], [3]],
        "other": [None, None],
        "solution": ["2", "2"],
        "teacher": ["maths", "maths"],
    }


async def test_a_conversation_is_told_as_messages() -> None:
    pool = Pool()
    await rewards_of(pool).fill_in([group(0, 0, messages=CHAT)], 1)
    told = pool.calls[0].arguments
    text = build_tokenizer().decode(SAMPLES[0].rollout.completion.token_ids, skip_special_tokens=True)
    assert told["prompts"] == [CHAT] and told["completions"] == [[{"role": "assistant", "content": text}]]


def test_what_nobody_gives_is_refused_with_what_there_is() -> None:
    check_arguments(["m:f"], [["prompts", "completions", "prompt_ids", "completion_ids", "trainer_state", "x"]], ["x"])
    with pytest.raises(
        ConfigError, match=r"m:f asks for `awnser`, but is given prompts, .*trainer_state, answer; name"
    ):
        check_arguments(["m:f"], [["awnser"]], ["answer"])
    with pytest.raises(ConfigError, match="the data have a column `completions`, which is the name of an argument"):
        check_arguments(["m:f"], [[]], ["a", "completions"])


async def test_a_sample_that_the_teacher_could_not_score_keeps_no_others_from_their_rewards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = group(0, 0, 1, 2)

    async def score(teachers: Teachers, rollouts: list[Rollout], **_: Any) -> list[Any]:
        first, second, third = rollouts
        scored = [replace(SAMPLES[i], rollout=rollout) for i, rollout in ((0, first), (2, third))]
        return [scored[0], Quarantined(second.prompt, second.completion, "refused"), scored[1]]

    monkeypatch.setattr(scoring, "score_rollouts", score)
    await Scoring(Teachers([]), Support("teacher_topk", 4, 261), 1.0, rewards_of(Pool())).score([one], 1)
    assert [sample.rewards for sample in one.samples] == [(5.0, 1.0), (2.0, 1.0)]
    assert len(one.quarantined) == 1


async def test_teachers_and_functions_are_asked_at_the_same_time_and_an_error_of_one_ends_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, cancelled = asyncio.Event(), asyncio.Event()

    async def score(*_: Any, **__: Any) -> list[Any]:
        asked.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return []

    class Failing:
        async def call(self, call: RewardCall) -> list[float | None]:
            await asked.wait()
            raise RewardError("m:first raised")

    monkeypatch.setattr(scoring, "score_rollouts", score)
    with pytest.raises(RewardError, match="m:first raised"):
        await Scoring(Teachers([]), Support("teacher_topk", 4, 261), 1.0, rewards_of(Failing())).score([group(0, 0)], 1)
    assert cancelled.is_set()
