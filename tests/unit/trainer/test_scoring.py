"""Groups that arrive while others are being scored: what is asked together, and whose each answer is."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from services.errors import PeerError
from tests.unit.trainer.samples import SAMPLES
from trainer import scoring
from trainer.groups import PromptGroup, Quarantined, Rollout
from trainer.scoring import Scoring
from trainer.teacher_scores import Support
from trainer.teachers import Teachers

SUPPORT = Support("teacher_topk", 4, 261)


def group(place: int, *samples: int) -> PromptGroup:
    rollouts = [SAMPLES[index].rollout for index in samples]
    return PromptGroup(place, rollouts[0].prompt, rollouts)


class Answers:
    """Stands where the teachers are asked; an answer waits until `go` is set.

    Attributes:
        asked: for each request the places among SAMPLES of what it scores.
        refused: places that are quarantined.
    """

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.refused: set[int] = set()
        self.go = asyncio.Event()

    async def __call__(self, teachers: Teachers, rollouts: list[Rollout], **options: Any) -> list[Any]:
        places = [next(i for i, s in enumerate(SAMPLES) if s.rollout is rollout) for rollout in rollouts]
        self.asked.append(places)
        await self.go.wait()
        return [
            Quarantined(SAMPLES[i].rollout.prompt, SAMPLES[i].rollout.completion, "refused")
            if i in self.refused
            else SAMPLES[i]
            for i in places
        ]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    answers = Answers()
    monkeypatch.setattr(scoring, "score_rollouts", answers)
    return answers


async def test_each_group_gets_the_scores_of_its_own_samples(answers: Answers) -> None:
    answers.go.set()
    answers.refused = {1}
    groups = [group(0, 3, 1), group(1, 0), group(2, 4, 2)]
    await Scoring(Teachers([]), SUPPORT, 1.0).score(groups)
    assert [
        [sample is SAMPLES[i] for sample, i in zip(g.samples, wanted, strict=True)]
        for g, wanted in zip(groups, [[3], [0], [4, 2]], strict=True)
    ] == [[True], [True], [True, True]]
    assert [[item.completion for item in g.quarantined] for g in groups] == [[SAMPLES[1].rollout.completion], [], []]


async def test_what_arrives_while_scores_are_waited_for_is_asked_in_one_request(answers: Answers) -> None:
    arriving: asyncio.Queue[PromptGroup | None] = asyncio.Queue()
    scoring = Scoring(Teachers([]), SUPPORT, 1.0)
    assert scoring.busy_s == 0.0
    working = asyncio.create_task(scoring.score_arriving(arriving))
    groups = [group(0, 0), group(1, 1), group(2, 2), group(3, 3)]
    for one in groups[:3]:
        arriving.put_nowait(one)
        await asyncio.sleep(0.01)
    assert answers.asked == [[0]]  # as soon as it was there
    answers.go.set()
    await asyncio.sleep(0.01)
    arriving.put_nowait(groups[3])
    await asyncio.sleep(0.01)
    assert not working.done()
    arriving.put_nowait(None)
    await working
    assert answers.asked == [[0], [1, 2], [3]]
    assert [len(one.samples) for one in groups] == [1, 1, 1, 1] and 0.02 <= scoring.busy_s < 60.0


async def test_nothing_is_asked_for_a_group_without_a_usable_completion(answers: Answers) -> None:
    arriving: asyncio.Queue[PromptGroup | None] = asyncio.Queue()
    arriving.put_nowait(replace(group(0, 0), rollouts=[]))
    arriving.put_nowait(None)
    answers.go.set()
    await Scoring(Teachers([]), SUPPORT, 1.0).score_arriving(arriving)
    assert answers.asked in ([], [[]])


async def test_an_error_of_a_teacher_ends_the_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise PeerError("no teacher has answered")

    monkeypatch.setattr(scoring, "score_rollouts", fail)
    arriving: asyncio.Queue[PromptGroup | None] = asyncio.Queue()
    arriving.put_nowait(group(0, 0))
    with pytest.raises(PeerError, match="no teacher has answered"):
        await Scoring(Teachers([]), SUPPORT, 1.0).score_arriving(arriving)


class Distrusted(Teachers):
    """No teachers, whose probes are asked for."""

    def __init__(self) -> None:
        super().__init__([])
        self.num_times = 0

    def distrust(self) -> None:
        self.num_times += 1


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
async def test_the_teachers_probes_are_due_every_few_steps(every: int, due: list[int], answers: Answers) -> None:
    teachers = Distrusted()
    scoring = Scoring(teachers, SUPPORT, 1.0, probe_every_steps=every)
    found = []
    for step in range(1, 7):
        arriving: asyncio.Queue[PromptGroup | None] = asyncio.Queue()
        arriving.put_nowait(None)
        before = teachers.num_times
        await scoring.score_arriving(arriving, step)
        found += [step] * (teachers.num_times - before)
    assert found == due
