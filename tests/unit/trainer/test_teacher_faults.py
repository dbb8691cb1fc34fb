"""A teacher that answers wrongly, over real HTTP: the sample is set aside with a reason, and many of them end the run."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.clients import TeacherClient
from services.errors import PeerError
from services.wire.teacher import TeacherScores
from tests.scripted_teacher import VOCAB, ScriptedTeacher
from tests.unit.trainer.attached import alone, scored
from tests.unit.trainer.teachers_choices import LENGTH, ROLLOUTS
from trainer.teacher_scores import Quarantine, Support

SUPPORT = Support("teacher_topk", 8, VOCAB)
BAD = 7  # the rollout whose rows are spoilt


ROWS = slice(BAD * LENGTH, (BAD + 1) * LENGTH)


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    with ScriptedTeacher().serving() as teacher:
        yield teacher


def with_value(name: str, value: float) -> Callable[[TeacherScores], TeacherScores]:
    def spoil(scores: TeacherScores) -> TeacherScores:
        column = getattr(scores, name).copy()
        column[BAD * LENGTH + 2, ...] = value
        return replace(scores, **{name: column})

    return spoil


def shifted(*names: str) -> Callable[[TeacherScores], TeacherScores]:
    """Each row of the bad sample is that of the position after it."""

    def spoil(scores: TeacherScores) -> TeacherScores:
        columns = {name: getattr(scores, name).copy() for name in names}
        for column in columns.values():
            column[ROWS] = np.roll(column[ROWS], -1, axis=0)
        return replace(scores, **columns)

    return spoil


def short(scores: TeacherScores) -> TeacherScores:
    """The bad sample lacks its last row."""
    last = ROWS.stop - 1
    offsets = scores.row_offsets.copy()
    offsets[BAD + 1 :] -= 1
    columns = {name: np.delete(column, last, axis=0) for name, column in scores.columns().items()}
    return replace(scores, row_offsets=offsets, **columns)


EVERY_COLUMN = ("token_ids", "token_logprobs", "topk_ids", "topk_logprobs", "tail_logprobs", "entropies")
FAULTS = {
    "null token": (with_value("token_logprobs", -np.inf), "not finite to a sampled token"),  # null in JSON
    "null candidate": (with_value("topk_logprobs", -np.inf), "no finite logprob"),
    "null tail": (with_value("tail_logprobs", -np.inf), "no finite logprob"),
    "NaN token": (with_value("token_logprobs", np.nan), "not finite to a sampled token"),
    "NaN candidate": (with_value("topk_logprobs", np.nan), "no finite logprob"),
    "short": (short, f"scored {LENGTH - 1} of {LENGTH} tokens"),
    "shifted": (shifted(*EVERY_COLUMN), "the teacher scored token"),
    "shifted unseen by the server": (shifted(*EVERY_COLUMN[1:]), "in row"),
    "shifted candidates": (shifted("topk_ids", "topk_logprobs", "tail_logprobs"), "in row"),
    "over-unit mass": (with_value("topk_logprobs", -1.0), "probabilities of one row sum to"),
    "one candidate twice": (with_value("topk_ids", 5), "a candidate twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_spoilt_sample_is_set_aside_and_the_others_are_kept(
    fault: str, teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    teacher.spoil, reason = FAULTS[fault]
    async with TeacherClient([teacher.url]) as client:
        samples, quarantined = await scored(alone(client), ROLLOUTS, support=SUPPORT, temperature=1.0)
    assert [s.rollout for s in samples] == [r for i, r in enumerate(ROLLOUTS) if i != BAD]
    Quarantine(tmp_path / "quarantine.jsonl", max_rate=0.05).add(quarantined, len(ROLLOUTS))
    (row,) = (json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert row["row"] == BAD + 1 and reason in row["reason"]
    with pytest.raises(PeerError, match=r"1 of 20 completions.*above pipeline\.max_quarantine_rate = 0\.04"):
        Quarantine(tmp_path / "quarantine.jsonl", max_rate=0.04).add(quarantined, len(ROLLOUTS))


async def test_a_good_teacher_has_nothing_set_aside(teacher: ScriptedTeacher) -> None:
    for temperature in (0.5, 1.0, 2.0):
        async with TeacherClient([teacher.url]) as client:
            samples, quarantined = await scored(alone(client), ROLLOUTS, support=SUPPORT, temperature=temperature)
        assert len(samples) == 20 and quarantined == []


async def test_a_teacher_that_becomes_another_model_is_refused(teacher: ScriptedTeacher) -> None:
    async with TeacherClient([teacher.url]) as client:
        await client.info()
        teacher.info = teacher.info.model_copy(update={"model": "other", "fingerprint": "g"})
        with pytest.raises(
            PeerError, match=rf"scripted \(f\) answered from {teacher.url}, other \(g\) from {teacher.url}"
        ):
            await scored(alone(client), ROLLOUTS, support=SUPPORT, temperature=1.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda scores: replace(scores, token_logprobs=scores.token_logprobs[:-1]), "token_logprobs of shape"),
        (lambda scores: replace(scores, row_offsets=scores.row_offsets[:-1]), "do not part 20 sequences"),
        (lambda scores: replace(scores, temperature=2.0), "temperature = 2.0, asked for 8, 1.0"),
    ],
)
async def test_an_answer_that_contradicts_itself_or_the_question_ends_the_run(
    spoil: Callable[[TeacherScores], TeacherScores], message: str, teacher: ScriptedTeacher
) -> None:
    teacher.spoil = spoil
    async with TeacherClient([teacher.url]) as client:
        with pytest.raises(PeerError, match=message):
            await scored(alone(client), ROLLOUTS, support=SUPPORT, temperature=1.0)
