"""The whole loop over servers in memory: what is asked under which weights, what is trained on, and in which order."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.errors import PeerError
from services.hub.run_folder import weights_folder
from services.process.signals import Interruption
from services.wire.rollout import RolloutCompletion, VersionSpan
from tests.scripted_teacher import ScriptedTeacher
from tests.unit.trainer.runs import PROMPTS, opener, pushes_of, rollouts_of, run_config
from trainer import parallel
from trainer import train as training
from trainer.open_session import open_session
from trainer.ranks.group import Ranks
from trainer.session import Session
from trainer.train import train

Disturb = Callable[[Session], None]


@dataclass
class Watched:
    """What one run did.

    Attributes:
        events: "sampled under V", "scored", "trained" and "pushed V", in order, each once where it happened again and again.
        sampled: token ids of the completions by the version that they were sampled under, of training and evaluation.
        trained: for each pass that is learned from, its rows and the tokens that it predicts.
    """

    events: list[str] = field(default_factory=list)
    sampled: dict[str, list[list[int]]] = field(default_factory=dict)
    trained: list[tuple[list[list[int]], list[int]]] = field(default_factory=list)

    def note(self, event: str) -> None:
        if self.events[-1:] != [event]:
            self.events.append(event)

    def watch(self, session: Session, teacher: ScriptedTeacher) -> None:
        rollouts: Any = rollouts_of(session)
        complete, good_answer = rollouts._complete, teacher.spoil

        def watched(*arguments: Any) -> RolloutCompletion:
            completion: RolloutCompletion = complete(*arguments)
            version = completion.policy_versions[-1].policy_version
            self.note(f"sampled under {version}")
            self.sampled.setdefault(version, []).append(completion.token_ids.tolist())
            return completion

        def answered(scores: Any) -> Any:
            self.note("scored")
            return good_answer(scores)

        def forward(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():
                self.note("trained")
                input_ids, _, token_ids = arguments[:3]
                self.trained.append((input_ids.tolist(), token_ids.tolist()))

        rollouts._complete, teacher.spoil = watched, answered
        pushes_of(session).on_push = lambda version: self.note(f"pushed {version}")
        session.learner.student.register_forward_pre_hook(forward)


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    with ScriptedTeacher().serving() as serving:
        yield serving


Run = Callable[..., Watched]


@pytest.fixture
def run(tiny_model_folder: Any, tmp_path: Path, teacher: ScriptedTeacher, monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(disturb: Disturb = lambda session: None, **sections: dict[str, Any]) -> Watched:
        watched = Watched()

        def prepare(session: Session) -> None:
            disturb(session)
            watched.watch(session, teacher)

        monkeypatch.setattr(training, "open_session", opener(teacher, prepare))
        train(run_config(tiny_model_folder("llama"), tmp_path / "out", **sections))
        return watched

    return run


def ages(folder: Path) -> list[int]:
    """The staleness of each step that was trained."""
    rows = (json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines())
    return [row["staleness"] for row in rows if "staleness" in row]


def test_strictly_on_policy_everything_takes_turns(run: Run, tmp_path: Path) -> None:
    """The evaluations ask as training does, under the first weights and under the last."""
    one_step = ["sampled under {0}.1@run", "scored", "trained", "pushed {1}"]
    before, after = ["pushed 0", "sampled under 0.1@run", "scored"], ["sampled under 3.1@run", "scored"]
    steps = [event.format(version, version + 1) for version in range(3) for event in one_step]
    assert run().events == [*before, *steps, *after]
    assert ages(tmp_path) == [0, 0, 0]


def test_a_step_trains_on_the_next_prompts_and_on_what_the_weights_before_it_have_sampled(run: Run) -> None:
    watched = run()
    assert len(watched.trained) == 3  # a step is one micro-batch
    for version, (rows, tokens) in enumerate(watched.trained):
        sampled = watched.sampled[f"{version}.1@run"][-4:]  # behind those of the evaluation
        prompts = [PROMPTS[(4 * version + i) % len(PROMPTS)].token_ids for i in range(4)]
        expected = [[*prompt, *completion] for prompt, completion in zip(prompts, sampled, strict=True)]
        assert sorted(tokens) == sorted(token for completion in sampled for token in completion)
        found = {tuple(row[: len(sequence)]) for row in rows for sequence in expected}
        assert len(rows) == 4 and all(tuple(sequence) in found for sequence in expected)


def test_a_completion_is_scored_before_the_last_one_has_arrived(run: Run, teacher: ScriptedTeacher) -> None:
    """The servers here send the first one and wait until a teacher has seen it."""

    def disturb(session: Session) -> None:
        rollouts: Any = rollouts_of(session)
        generate = rollouts.generate

        async def one_then_the_rest(*asked: Any, on_completion: Any, **options: Any) -> list[RolloutCompletion]:
            held: list[RolloutCompletion] = []
            completions: list[RolloutCompletion] = await generate(*asked, on_completion=held.append, **options)
            if rollouts.num_calls in (2, 3):  # of the steps; an evaluation is scored when all is there
                has_scored.clear()
                on_completion(held.pop(0))
                assert await asyncio.to_thread(has_scored.wait, 20.0)
            for completion in held:
                on_completion(completion)
            return completions

        rollouts.generate = one_then_the_rest

    has_scored = threading.Event()
    answer = teacher.spoil

    def spoil(scores: Any) -> Any:
        has_scored.set()
        return answer(scores)

    teacher.spoil = spoil
    assert len(run(disturb, pipeline={"steps": 2}).trained) == 2


def with_an_older_token(session: Session) -> None:
    """From version 1 on, the first token of each prompt's completion is of the version before."""
    rollouts: Any = rollouts_of(session)
    complete = rollouts._complete

    def mixed(index: int, most: int) -> RolloutCompletion:
        found: RolloutCompletion = complete(index, most)
        version = int(found.policy_versions[0].policy_version.split(".")[0])
        if version == 0 or len(found.token_ids) == 1:
            return found
        found.policy_versions[:] = [
            VersionSpan(f"{version - 1}.1@run", 0, 1),
            VersionSpan(f"{version}.1@run", 1, len(found.token_ids)),
        ]
        return found

    rollouts._complete = mixed


def test_a_completion_is_as_old_as_its_oldest_token(run: Run, tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="sampled under version 0 for a step that starts from version 1"):
        run(with_an_older_token)
    assert ages(tmp_path) == [0]


@pytest.mark.parametrize(
    ("logprobs", "reason"),
    [
        (lambda found: found[:-1], r"logprobs for \d+ tokens"),
        (lambda found: np.full_like(found, np.nan), "not finite"),
        (lambda found: np.ones_like(found), "no probability"),
    ],
    ids=["short", "NaN", "above 0"],
)
def test_logprobs_that_cannot_be_are_never_trained_on(logprobs: Any, reason: str, run: Run, tmp_path: Path) -> None:
    def disturb(session: Session) -> None:
        rollouts: Any = rollouts_of(session)
        complete = rollouts._complete

        def spoilt(index: int, most: int) -> RolloutCompletion:
            found = complete(index, most)
            object.__setattr__(found, "rollout_logprobs", logprobs(found.rollout_logprobs))
            return found

        rollouts.on_call = lambda call: setattr(rollouts, "_complete", spoilt) if call == 2 else None

    with pytest.raises(PeerError, match=reason):
        run(disturb)
    assert ages(tmp_path) == []


@pytest.mark.parametrize(("every", "evaluated"), [(0, [0, 5]), (1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (5, [0, 5])])
def test_an_evaluation_is_made_every_so_many_steps_and_at_both_ends(every: int, evaluated: list[int], run: Run) -> None:
    versions: list[int] = []

    def disturb(session: Session) -> None:
        assert session.evaluator is not None
        evaluate = session.evaluator.evaluate

        def watched(learner: Any, policy_version: int) -> Any:
            versions.append(policy_version)
            return evaluate(learner, policy_version)

        session.evaluator.evaluate = watched  # type: ignore[method-assign]

    run(disturb, pipeline={"steps": 5, "prompts_per_step": 1}, evaluation={"every_steps": every, "num_prompts": 1})
    assert versions == evaluated


def test_a_complete_runs_student_has_a_card_with_its_results_and_is_ready_to_push(run: Run, tmp_path: Path) -> None:
    run(lambda session: None, pipeline={"steps": 2, "prompts_per_step": 1}, evaluation={"num_prompts": 2})
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| reverse KL"))
    for side in ("before", "after"):
        assert f"| {summary[side]['reverse_kl']:.4f} ± {summary[side]['reverse_kl_stderr']:.4f} " in row
    assert "| steps | 2 |" in card and str(tmp_path) not in card
    assert weights_folder(tmp_path / "out", "merged") == tmp_path / "out" / "student"


def test_the_time_of_the_first_step_is_without_what_was_before_it(run: Run, tmp_path: Path) -> None:
    def disturb(session: Session) -> None:
        session.evaluator = None
        session.record._started -= 100.0  # loading, say

    run(disturb)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["wall_s"] > 100.0 and all(0 < row["step_s"] < 60.0 for row in rows)


class _Loaded(Exception):
    """The student is loaded; nothing is there to attach to."""


@pytest.mark.parametrize(("given", "expected"), [(None, False), (True, True), (False, False)])  # on a CPU
def test_a_run_opens_its_student_with_the_checkpointing_of_its_options(
    given: bool | None, expected: bool, tiny_model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, found = parallel.load_student, []

    def loading(*arguments: Any, **options: Any) -> None:
        found.append(load(*arguments, **options).model.is_gradient_checkpointing)
        raise _Loaded

    monkeypatch.setattr(parallel, "load_student", loading)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1="}) + "\n")
    folder, data = tiny_model_folder("llama"), {"path": str(tmp_path / "rows.jsonl")}
    student = {"model": folder, "gradient_checkpointing": given}
    with (
        pytest.raises(_Loaded),
        open_session(run_config(folder, tmp_path / "out", student=student, data=data), Interruption(), Ranks()),
    ):
        pass
    assert found == [expected]
