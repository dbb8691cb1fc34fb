"""What a run survives between its prompts and its batches: weights that are too old, servers that want them again, our own bugs."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.errors import OutageError
from services.wire.rollout import RolloutCompletion, VersionSpan
from tests.integration.processes import wait_until
from tests.scripted_teacher import ScriptedTeacher
from tests.unit.trainer.runs import opener, pushes_of, rollouts_of, run_config
from trainer import train as training
from trainer.session import Session
from trainer.train import train

NUM_STEPS, NUM_PROMPTS = 3, 4


class Watched:
    """A run of three steps of four prompts, each call for completions and each push in its order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.num_trained: list[int] = []

    def watch(self, session: Session) -> None:
        rollouts: Any = rollouts_of(session)
        generate, step = rollouts.generate, session.learner.step

        async def noted(prompts: Any, *arguments: Any, **options: Any) -> Any:
            self.events.append(f"{len(prompts)} under {rollouts.version}")
            return await generate(prompts, *arguments, **options)

        def counted(batch: Any) -> Any:
            self.num_trained.append(len(batch))
            return step(batch)

        rollouts.generate, session.learner.step = noted, counted  # type: ignore[method-assign]
        pushes_of(session).on_push = lambda version: self.events.append(f"push {version}")
        session.evaluator = None


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    with ScriptedTeacher().serving() as serving:
        yield serving


@pytest.fixture
def run(tiny_model_folder: Any, tmp_path: Path, teacher: ScriptedTeacher, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(disturb: Any, max_staleness: int = 0, **sections: Any) -> Watched:
        watched = Watched()

        def prepare(session: Session) -> None:
            disturb(session)
            watched.watch(session)

        monkeypatch.setattr(training, "open_session", opener(teacher, prepare))
        config = run_config(tiny_model_folder("llama"), tmp_path / "out", **sections)
        # As if the option took more than 0.
        pipeline = config.pipeline.model_copy(update={"max_staleness": max_staleness})
        train(config.model_copy(update={"pipeline": pipeline}))
        return watched

    return run


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "out" / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in found if "num_steps" in row]


def at_call(number: int, act: Any) -> Any:
    return lambda session: setattr(
        rollouts_of(session), "on_call", lambda call: act(session) if call == number else None
    )


def of_the_version_before(session: Session, num_calls: int = 1) -> None:
    """From this call on, `num_calls` in all, the second completion is of a server that has missed the last push."""
    rollouts: Any = rollouts_of(session)
    complete, first = rollouts._complete, rollouts.num_calls

    def lagging(index: int, most: int) -> RolloutCompletion:
        found: RolloutCompletion = complete(index, most)
        if index == min(1, session.config.pipeline.prompts_per_step - 1) and rollouts.num_calls < first + num_calls:
            found.policy_versions[:] = [VersionSpan("0.1@run", 0, len(found.token_ids))]
        return found

    rollouts._complete = lagging


def test_a_completion_that_is_too_old_is_dropped_counted_and_made_again(run: Any, tmp_path: Path) -> None:
    watched = run(at_call(2, of_the_version_before))
    assert watched.events == [
        *("push 0", "4 under 0.1@run", "push 1", "4 under 1.1@run", "1 under 1.1@run", "push 2"),
        *("4 under 2.1@run", "push 3"),
    ]
    assert watched.num_trained == [NUM_PROMPTS] * NUM_STEPS
    assert [(row["num_stale"], row["staleness"]) for row in rows(tmp_path)] == [(0, 0), (1, 0), (0, 0)]


def test_within_the_bound_an_older_completion_is_trained_on(run: Any, tmp_path: Path) -> None:
    watched = run(at_call(2, of_the_version_before), max_staleness=1)
    assert watched.num_trained == [NUM_PROMPTS] * NUM_STEPS
    assert [row["num_stale"] for row in rows(tmp_path)] == [0] * NUM_STEPS
    assert max(row["staleness"] for row in rows(tmp_path)) == 1


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_batches_are_made_as_far_ahead_as_the_bound_lets_them(run: Any, max_staleness: int, tmp_path: Path) -> None:
    def train_once_all_are_begun(session: Session) -> None:
        step = session.learner.step

        def waiting(batch: Any) -> Any:
            wait_until(lambda: rollouts_of(session).num_calls == min(6, len(rows(tmp_path)) + 1 + max_staleness))
            return step(batch)

        session.learner.step = waiting  # type: ignore[method-assign]

    watched = run(train_once_all_are_begun, max_staleness, pipeline={"steps": 6, "prompts_per_step": 4})
    assert watched.num_trained == [NUM_PROMPTS] * 6
    assert [row["staleness"] for row in rows(tmp_path)] == [min(step, max_staleness) for step in range(6)]
    assert watched.events.count("4 under 0.1@run") == max_staleness + 1


def wanting_weights(session: Session) -> None:
    """All servers are started again while they complete; they wait for a push."""
    rollouts: Any = rollouts_of(session)
    generate, wanted = rollouts.generate, rollouts.group.weights_wanted
    publish = session.weights.publish

    async def waits(*arguments: Any, **options: Any) -> Any:
        rollouts.generate = generate
        assert options["waits_for_weights"]
        wanted.set()
        while wanted.is_set():
            await asyncio.sleep(0.01)
        return await generate(*arguments, **options)

    async def answering(*arguments: Any) -> Any:
        pushed = await publish(*arguments)
        wanted.clear()
        return pushed

    rollouts.generate, session.weights.publish = waits, answering  # type: ignore[method-assign]


def test_servers_that_were_all_started_again_are_sent_the_weights_once_more(run: Any, tmp_path: Path) -> None:
    def disturb(session: Session) -> None:
        pushes = pushes_of(session)
        publish = pushes.publish

        async def then(*arguments: Any) -> Any:
            pushed = await publish(*arguments)
            if list(pushes.versions._live) == ["0.1@run", "1.1@run"]:
                wanting_weights(session)
            return pushed

        pushes.publish = then  # type: ignore[method-assign]

    watched = run(disturb)
    pushed = [event for event in watched.events if event.startswith("push")]
    assert pushed == ["push 0", "push 1", "push 1", "push 2", "push 3"]
    assert "4 under 1.2@run" in watched.events and watched.num_trained == [NUM_PROMPTS] * NUM_STEPS
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def failing(session: Session) -> None:
    raise ZeroDivisionError("a bug")


def test_a_bug_in_the_pipeline_costs_time_and_not_the_run(run: Any) -> None:
    watched = run(at_call(2, failing))
    assert watched.num_trained == [NUM_PROMPTS] * NUM_STEPS and watched.events.count("4 under 1.1@run") == 2


def test_what_was_scored_before_a_bug_is_kept(run: Any, teacher: ScriptedTeacher) -> None:
    """The second completion of the second step is handed on once the first is scored, and then something breaks."""
    is_scored = asyncio.Event()

    def disturb(session: Session) -> None:
        rollouts: Any = rollouts_of(session)
        generate, score = rollouts.generate, session.pipeline._scoring.score

        async def scoring(groups: Any, step: int = 0) -> None:
            await score(groups, step)
            is_scored.set()

        async def breaks(*arguments: Any, on_completion: Any, **options: Any) -> Any:
            held: list[Any] = []
            completions = await generate(*arguments, on_completion=held.append, **options)
            if rollouts.num_calls == 2:
                is_scored.clear()
                on_completion(held[0])
                await is_scored.wait()
                raise ZeroDivisionError("a bug")
            for completion in held:
                on_completion(completion)
            return completions

        rollouts.generate, session.pipeline._scoring.score = breaks, scoring  # type: ignore[method-assign]

    watched = run(disturb)
    assert watched.events[3:5] == ["4 under 1.1@run", "3 under 1.1@run"]
    assert watched.num_trained == [NUM_PROMPTS] * NUM_STEPS


def test_a_bug_that_comes_again_ends_the_run_with_itself(run: Any) -> None:
    def disturb(session: Session) -> None:
        rollouts_of(session).on_call = lambda call: failing(session) if call >= 2 else None

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(disturb)


def test_bugs_of_three_kinds_in_a_row_end_the_run(run: Any) -> None:
    def disturb(session: Session) -> None:
        def differently(call: int) -> None:
            if call >= 2:
                raise ZeroDivisionError(f"bug {call}")

        rollouts_of(session).on_call = differently

    with pytest.raises(ZeroDivisionError, match="bug 4"):
        run(disturb)


def test_an_outage_beyond_its_budget_is_no_bug(run: Any) -> None:
    def away(session: Session) -> None:
        raise OutageError("no rollout server has answered")

    with pytest.raises(OutageError):
        run(at_call(2, away))
