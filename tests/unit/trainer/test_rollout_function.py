"""A user's rollout function: what it is given, what of its answer is trained on, and what is refused."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.errors import PeerError, UserCodeError
from services.wire.rollout import RolloutSampling
from tests.unit.trainer.runs import END, PROMPTS, VOCAB, Pushes, Rollouts
from tests.unit.trainer.user_runs import Run
from trainer.groups import PromptGroup
from trainer.rollout_function import OwnRollouts, StudentClient
from trainer.session import Session
from trainer.tiny.pair import build_tokenizer
from trainer.user_objects import UserObjects

SAMPLING = RolloutSampling(max_new_tokens=4)


async def plain(prompts: Any, sampling: Any, client: StudentClient) -> dict[str, Any]:
    """What the trainer does by itself."""
    completions = await client.generate([prompt.token_ids for prompt in prompts])
    return {
        "completion_ids": [c.token_ids for c in completions],
        "logprobs": [c.rollout_logprobs.tolist() for c in completions],
    }


def groups_of(
    function: Any, samples: int = 1, count: int = 2, timeout_s: float = 20.0, **options: Any
) -> list[PromptGroup]:
    """What comes of a function for the first prompts, under version 3."""
    rollouts: Any = Rollouts()
    pushes = Pushes(rollouts)
    label = pushes.versions.next_label(3)
    pushes.versions.set_live(label)
    rollouts.version = str(label)
    own = OwnRollouts(
        function,
        timeout_s,
        rollouts,
        pushes.versions,
        build_tokenizer(),
        VOCAB,
        options.get("max_model_len", 64),
        [END],
    )
    return asyncio.run(own.generate_groups(PROMPTS[:count], SAMPLING, samples))


def answering(**columns: Any) -> Callable[..., Any]:
    """A function that asks once and answers with these columns, of two prompts, over good ones."""

    async def function(prompts: Any, sampling: Any, client: StudentClient) -> dict[str, Any]:
        await client.generate([prompts[0].token_ids])
        good = {"completion_ids": [[50, 51], [52]], "logprobs": [[-1.0, -2.0], [-3.0]]}
        return {name: value for name, value in {**good, **columns}.items() if value is not None}

    return function


def test_its_completions_are_grouped_by_prompt() -> None:
    async def two_each(prompts: Any, sampling: Any, client: Any) -> dict[str, Any]:
        assert [prompt.row for prompt in prompts] == [1, 1, 2, 2] and sampling == SAMPLING
        await client.generate([[48]])
        return {"completion_ids": [[n] for n in range(4)], "logprobs": [[-n] for n in range(4)]}

    groups = groups_of(two_each, samples=2)
    assert [[r.completion.token_ids.tolist() for r in group.rollouts] for group in groups] == [[[0], [1]], [[2], [3]]]
    assert [r.completion.rollout_logprobs.tolist() for r in groups[1].rollouts] == [[-2.0], [-3.0]]
    where = [(r.completion.prompt_index, r.completion.sample_index) for group in groups for r in group.rollouts]
    assert where == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [group.place for group in groups] == [0, 1] and groups[0].rollouts[0].policy_version == 3


def test_a_completion_that_ends_with_no_end_token_is_truncated_unless_it_says_otherwise() -> None:
    ids = [[50, END], [50, 51]]
    found = groups_of(answering(completion_ids=ids, logprobs=[[-1.0] * 2] * 2))
    assert [group.rollouts[0].completion.truncated for group in found] == [False, True]
    found = groups_of(answering(completion_ids=ids, logprobs=[[-1.0] * 2] * 2, truncated=[True, False]))
    assert [group.rollouts[0].completion.truncated for group in found] == [True, False]


def test_a_mask_prompt_ids_and_other_columns_ride_along() -> None:
    columns = {"completion_mask": [[1, 0], [1]], "logprobs": [[-1.0, None], [-3.0]], "score": np.array([7, 8])}
    first, second = groups_of(answering(**columns, prompt_ids=[[9, 9], PROMPTS[1].token_ids]))
    rollout = first.rollouts[0]
    assert rollout.loss_mask is not None and rollout.loss_mask.tolist() == [True, False]
    assert rollout.completion.rollout_logprobs.tolist() == [-1.0, 0.0]
    assert rollout.prompt.token_ids == [9, 9] and rollout.prompt.columns["score"] == 7
    assert second.rollouts[0].loss_mask is None and PROMPTS[0].token_ids != [9, 9]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"logprobs": None}, "returned no logprobs"),
        (
            {"completion_ids": [[50]]},
            "returned 1 entries as completion_ids; it must be a list with one entry for each of 2",
        ),
        ({"score": 3}, "returned a int as score"),
        ({"score": "ab"}, "returned a str as score"),
        ({"score": [object(), 1]}, r"sample 0 \(row 1\): score is no JSON"),
        ({"logprobs": [[-1.0], [-3.0]]}, r"sample 0 \(row 1\): 1 logprobs for 2 tokens"),
        ({"logprobs": [[-1.0, -2.0], [float("nan")]]}, r"sample 1 \(row 2\): it gave a logprob that is not finite"),
        ({"logprobs": [[-1.0, 0.5], [-1.0]]}, r"sample 0 \(row 1\): it sent the logprob 0.5"),
        ({"logprobs": [[-1.0, "x"], [-1.0]]}, r"sample 0 \(row 1\): logprobs must be a list of numbers"),
        ({"logprobs": [None, [-1.0]]}, r"sample 0 \(row 1\): object of type 'NoneType' has no len"),
        (
            {"completion_ids": [[50, 51], [VOCAB]]},
            rf"sample 1 \(row 2\): completion_ids has the id {VOCAB}, which is outside",
        ),
        ({"completion_ids": [[-1, 51], [1]]}, "the id -1"),
        (
            {"completion_ids": [[50, 51], []]},
            r"sample 1 \(row 2\): completion_ids must be a list of token ids, at least one",
        ),
        ({"completion_ids": [[50, 51.5], [1]]}, "must be a list of token ids"),
        ({"completion_ids": [["a", "b"], [1]]}, "must be a list of token ids"),
        ({"completion_ids": [[50, 51], [2**70]]}, r"sample 1 \(row 2\)"),
        ({"completion_ids": [[[50], [51, 52]], [1]]}, r"sample 0 \(row 1\)"),
        ({"completion_mask": [[1], [1]]}, "completion_mask has 1 entries for 2 tokens"),
        ({"completion_mask": [[1, 2], [1]]}, "completion_mask must hold 0 and 1 alone"),
        ({"truncated": ["no", True]}, "truncated is 'no'"),
        ({"policy_versions": [1, 2]}, "policy_versions is 1"),
        (
            {"prompt_ids": [[1] * 63, [1]]},
            r"sample 0 \(row 1\): prompt and completion have 65 tokens, more than the 64",
        ),
    ],
)
def test_what_cannot_be_trained_on_ends_with_one_line(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserCodeError, match=message) as caught:
        groups_of(answering(**columns))
    assert str(caught.value).startswith("the rollout function answering.<locals>.function returned")
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_live_are_refused() -> None:
    with pytest.raises(PeerError, match=r"sampled under the version '2\.1@old'"):
        groups_of(answering(policy_versions=["2.1@old", "2.1@old"]))


def test_a_function_that_never_asks_must_say_which_weights_sampled() -> None:
    def silent(prompts: Any, sampling: Any, client: Any) -> dict[str, Any]:
        return {"completion_ids": [[1], [2]], "logprobs": [[-1.0], [-1.0]]}

    with pytest.raises(UserCodeError, match="silent never asked the client"):
        groups_of(silent)
    told = groups_of(lambda *_: silent(*_) | {"policy_versions": ["3.1@run"] * 2})
    assert told[0].rollouts[0].policy_version == 3


@pytest.mark.parametrize("answer", [None, [1], "text"])
def test_an_answer_that_is_no_dict_is_named(answer: Any) -> None:
    with pytest.raises(UserCodeError, match=f"returned a {type(answer).__name__}; it must return a dict"):
        groups_of(lambda *_: answer)


def test_a_function_that_is_not_async_runs_beside_the_loop_and_may_ask() -> None:
    threads = []

    def function(prompts: Any, sampling: Any, client: StudentClient) -> dict[str, Any]:
        threads.append(threading.current_thread())
        completions = client.generate_sync([prompt.token_ids for prompt in prompts])
        return {
            "completion_ids": [c.token_ids for c in completions],
            "logprobs": [c.rollout_logprobs for c in completions],
        }

    by_thread, by_loop = groups_of(function), groups_of(plain)
    assert threads[0] is not threading.main_thread() and threads[0].daemon
    for one, other in zip(by_thread, by_loop, strict=True):
        assert one.rollouts[0].completion.token_ids.tolist() == other.rollouts[0].completion.token_ids.tolist()


def test_asking_in_a_way_that_would_wait_for_itself_is_named() -> None:
    async def function(prompts: Any, sampling: Any, client: StudentClient) -> Any:
        return client.generate_sync([[48]])

    with pytest.raises(UserCodeError, match=r"use `await client\.generate"):
        groups_of(function)


def hang(*_: Any) -> None:
    time.sleep(600)


async def hang_async(*_: Any) -> None:
    await asyncio.sleep(600)


@pytest.mark.parametrize("function", [hang, hang_async])
def test_a_function_that_hangs_ends_with_its_deadline(function: Any) -> None:
    started = time.monotonic()
    with pytest.raises(UserCodeError, match=r"hang\w* has not returned after 0.2 s \(rollout_timeout_s\)"):
        groups_of(function, timeout_s=0.2)
    assert time.monotonic() - started < 10.0


@pytest.mark.parametrize("error", [ValueError("no\nluck"), TimeoutError("mine"), StopIteration(), SystemExit(3)])
def test_what_it_raises_is_one_line_with_its_name(error: BaseException) -> None:
    def function(*_: Any) -> None:
        raise error

    async def function_async(*_: Any) -> None:
        raise error

    said = r"raised (ValueError: no luck|TimeoutError: mine|RuntimeError: (StopIteration|SystemExit|coroutine))"
    for one in (function, function_async):
        with pytest.raises(UserCodeError, match=f"the rollout function .*{one.__name__} {said}"):
            groups_of(one)


def test_an_error_of_a_server_stays_one() -> None:
    async def function(prompts: Any, sampling: Any, client: StudentClient) -> Any:
        raise PeerError("away")

    with pytest.raises(PeerError, match=r"^away$"):
        groups_of(function)


def test_a_run_trains_on_what_the_function_returns(run: Run) -> None:
    """Of the tokens 50 and 51, whatever was sampled, the first one alone counts."""
    asked: list[int] = []
    trained: list[tuple[list[int], list[bool]]] = []

    async def function(prompts: Any, sampling: Any, client: StudentClient) -> dict[str, Any]:
        asked.append(len(prompts))
        await client.generate([prompt.token_ids for prompt in prompts])
        count = len(prompts)
        return {
            "completion_ids": [[50, 51]] * count,
            "logprobs": [[-2.0, 0.0]] * count,
            "completion_mask": [[1, 0]] * count,
        }

    def watch(session: Session) -> None:
        step = session.learner.step

        def watched(batch: Any) -> Any:
            trained.append((batch.token_ids.tolist(), batch.counts().tolist()))
            metrics = step(batch)
            assert metrics["num_valid_tokens"] == 4
            return metrics

        session.learner.step = watched  # type: ignore[method-assign]

    run(UserObjects(rollout_function=function), watch)
    assert asked == [4, 4, 4] and trained == [([50, 51] * 4, [True, False] * 4)] * 3


def test_a_function_that_fails_ends_the_run_with_the_student_saved(run: Run, tmp_path: Path) -> None:
    calls = []

    async def function(prompts: Any, sampling: Any, client: StudentClient) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("second call")
        return await plain(prompts, sampling, client)

    with pytest.raises(UserCodeError, match=r"the rollout function .*function raised ValueError: second call"):
        run(UserObjects(rollout_function=function))
    assert (tmp_path / "out" / "student" / "config.json").exists()
