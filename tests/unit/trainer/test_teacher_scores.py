"""No unusable teacher row becomes a number in a loss."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from services.clients import TeacherClient
from services.errors import PeerError
from services.wire.teacher import TeacherScores
from tests.scripted_teacher import ScriptedTeacher, logprobs_of
from tests.unit.trainer.attached import alone, scored
from tests.unit.trainer.samples import TOP_K, VOCAB, sample
from trainer.groups import Quarantined, ScoredSample
from trainer.teacher_scores import Quarantine, Support, defect

SUPPORT = Support("teacher_topk", TOP_K, VOCAB)


def changed(**arrays: Any) -> ScoredSample:
    return ScoredSample(**{**vars(sample(0, 2, 3)), **arrays})


def with_value(name: str, value: float) -> ScoredSample:
    array = getattr(sample(0, 2, 3), name).copy()
    array.flat[0] = value
    return changed(**{name: array})


def test_only_a_students_support_is_asked_of_the_rollout_servers() -> None:
    assert (Support("student_topk", 4, 9).student_top_k, Support("teacher_topk", 4, 9).student_top_k) == (4, 0)


def test_a_good_sample_has_no_defect() -> None:
    assert defect(sample(0, 2, 3), SUPPORT) is None


def test_rows_that_are_not_of_one_distribution_are_named() -> None:
    """The sampled tokens are 10, a candidate, and 11, which is not; the row is 1/2, 1/4 and a tail of 1/4."""
    rollout = sample(0, 1, 2).rollout
    rollout = replace(rollout, completion=replace(rollout.completion, token_ids=np.array([10, 11], np.int32)))

    def row(*logprobs: float) -> str:
        shares = np.log([[0.5, 0.25]] * 2)
        ids = np.array([[9, 10], [9, 10]], np.int32)
        tail = np.log([0.25, 0.25])
        return defect(ScoredSample(rollout, np.array(logprobs), ids, shares, tail), SUPPORT) or ""

    assert row(np.log(0.25), np.log(0.25)) == row(np.log(0.25) + 9e-4, -40.0) == ""
    assert row(np.log(0.5), -2.0) == "the teacher gave token 10 in row 0 -0.6931, and -1.3863 among its candidates"
    assert row(-40.0, -2.0) == "the teacher gave token 10 in row 0 -40.0000, and -1.3863 among its candidates"
    assert (
        row(np.log(0.25), np.log(0.26))
        == "the teacher gave token 11 in row 1 -1.3471, and at most -1.3863 to those outside its candidates"
    )
    rollout = replace(rollout, completion=replace(rollout.completion, token_ids=np.array([7, 11], np.int32)))
    # The student's own top-k need not be the teacher's: there, only the tail bounds what is outside.
    wide = np.log([[0.1, 0.1]] * 2), np.array([[9, 10], [9, 10]], np.int32), np.log([0.8, 0.8])
    outside = ScoredSample(rollout, np.log([0.7, 0.7]), wide[1], wide[0], wide[2])
    assert defect(outside, Support("student_topk", 2, VOCAB)) is None
    assert "at most -2.3026" in (defect(outside, SUPPORT) or "")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (with_value("teacher_token_logprobs", np.nan), "not finite"),
        (with_value("teacher_token_logprobs", -np.inf), "not finite"),
        (with_value("teacher_support_logprobs", np.nan), "no finite logprob"),
        (with_value("teacher_support_logprobs", np.inf), "no finite logprob"),
        (with_value("teacher_tail_logprob", np.nan), "no finite logprob"),
        (with_value("teacher_tail_logprob", -np.inf), "no finite logprob"),
        (with_value("support_ids", int(sample(0, 2, 3).support_ids[0, 1])), "twice in one row"),
        (with_value("teacher_support_logprobs", 0.0), "sum to"),
        (with_value("teacher_support_logprobs", -50.0), "sum to 0."),
        (with_value("teacher_token_logprobs", 5.0), "the logprob 5, which is no probability"),
        (with_value("support_ids", -1), "candidate -1 is no token"),
        (changed(support_ids=sample(0, 2, 3).support_ids[:2]), "shapes (2, 4), (3, 4) and (3,) for 3 tokens"),
        (
            changed(
                support_ids=sample(0, 2, 3).support_ids[:2],
                teacher_support_logprobs=sample(0, 2, 3).teacher_support_logprobs[:2],
            ),
            "shapes (2, 4), (2, 4) and (3,)",
        ),
        (changed(teacher_token_logprobs=np.zeros(2, np.float32)), "scored 2 of 3 tokens"),
        (
            with_value("support_ids", VOCAB),
            f"candidate {VOCAB} is padding of the teacher: the student has {VOCAB} tokens",
        ),
    ],
)
def test_unusable_rows_are_named(bad: ScoredSample, reason: str) -> None:
    assert reason in (defect(bad, SUPPORT) or "")


def test_rounding_may_carry_a_row_slightly_over_unit_mass() -> None:
    def row(over: float) -> ScoredSample:
        return changed(
            teacher_token_logprobs=np.full(3, -5.0),
            teacher_support_logprobs=np.log(np.full((3, 4), 0.2)),
            teacher_tail_logprob=np.log(np.full(3, 0.2 + over)),
        )

    assert defect(row(0.0009), SUPPORT) is None
    assert defect(row(0.0011), SUPPORT) == "the teacher's probabilities of one row sum to 1.0011"


def test_an_empty_tail_is_a_defect_for_the_students_support_too() -> None:
    support = Support("student_topk", TOP_K, VOCAB)
    assert "no finite logprob" in (defect(with_value("teacher_tail_logprob", -np.inf), support) or "")


def test_a_teacher_that_holds_a_sampled_token_for_unlikely_but_possible_is_fine() -> None:
    assert defect(with_value("teacher_token_logprobs", -80.0), SUPPORT) is None


class Teacher:
    """Answers with the rows of the given samples, and remembers what it was asked."""

    def __init__(self, samples: list[ScoredSample]) -> None:
        self.samples = samples

    async def score(self, sequences: list[tuple[list[int], int]], **options: object) -> TeacherScores:
        self.asked = (sequences, options)
        tokens, ids, support, tail = (
            np.concatenate([getattr(s, name) for s in self.samples])
            for name in ("teacher_token_logprobs", "support_ids", "teacher_support_logprobs", "teacher_tail_logprob")
        )
        offsets = np.cumsum([0, *(len(s.teacher_token_logprobs) for s in self.samples)])
        scored = np.concatenate([s.rollout.completion.token_ids for s in self.samples])
        return TeacherScores("t", "f", 0.5, 4, offsets, scored, tokens, ids, support, tail, np.zeros(len(tokens)))


async def test_every_rollout_gets_its_own_rows_and_a_bad_one_is_set_aside() -> None:
    good, other = sample(1, 2, 3), sample(2, 4, 5)
    teacher = Teacher([good, with_value("teacher_token_logprobs", np.nan), other])
    samples, quarantined = await scored(
        alone(teacher),
        [s.rollout for s in teacher.samples],
        support=SUPPORT,
        temperature=0.5,
    )
    sequences, options = teacher.asked
    assert callable(options.pop("on_refused"))
    assert options == {"top_k": 4, "temperature": 0.5, "on_mismatch": "keep"}
    assert [(len(ids), prompt) for ids, prompt in sequences] == [(5, 2), (5, 2), (9, 4)]
    assert sequences[2][0] == [*other.rollout.prompt.token_ids, *other.rollout.completion.token_ids]
    assert [s.rollout for s in samples] == [good.rollout, other.rollout]
    for found, expected in zip(samples, (good, other), strict=True):
        for name in ("teacher_token_logprobs", "support_ids", "teacher_support_logprobs", "teacher_tail_logprob"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    assert [(q.completion, "not finite" in q.reason) for q in quarantined] == [
        (teacher.samples[1].rollout.completion, True)
    ]


@pytest.mark.parametrize("kind", ["teacher_topk", "student_topk"])
@pytest.mark.parametrize("refused", [(1,), (0, 1, 2)])
async def test_a_sequence_that_the_teacher_refuses_is_set_aside_with_its_reason(
    refused: tuple[int, ...], kind: Literal["teacher_topk", "student_topk"]
) -> None:
    """Against the real client: the server names one refused sequence at a time by its place in the request."""
    samples = []
    for seed in range(3):
        original = sample(seed, 2, 3)
        topk = np.tile(np.arange(2, dtype=np.int32), (3, 1))
        rollout = replace(original.rollout, completion=replace(original.rollout.completion, student_topk_ids=topk))
        samples.append(replace(original, rollout=rollout))
    bad_tokens = [samples[index].rollout.completion.token_ids[0] for index in refused]
    teacher = ScriptedTeacher()

    def refuse(body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        for index, sequence in enumerate(body["sequences"]):
            if sequence["token_ids"][2] in bad_tokens:
                field = f"sequences.{index}.token_ids"
                return 422, {"detail": f"{field} holds id 151900, the model has 151669", "field": field}
        return None

    def add_support(scores: TeacherScores) -> TeacherScores:
        if kind == "teacher_topk":
            return scores
        rows, asked = len(scores.token_ids), teacher.bodies[-1]["sequences"]
        dense = np.concatenate([logprobs_of(s["token_ids"], s["prompt_length"], 1.0) for s in asked])
        tails = np.log1p(-np.exp(dense[:, :2]).sum(1))
        assert len(dense) == rows
        return replace(scores, support_logprobs=dense[:, :2], support_tail_logprobs=tails)

    teacher.refuse, teacher.spoil = refuse, add_support
    with teacher.serving():
        async with TeacherClient([teacher.url]) as client:
            kept, quarantined = await scored(
                alone(client), [s.rollout for s in samples], support=Support(kind, 2, VOCAB), temperature=1.0
            )
    assert [s.rollout for s in kept] == [s.rollout for i, s in enumerate(samples) if i not in refused]
    assert [q.completion for q in quarantined] == [samples[i].rollout.completion for i in refused]
    reason = "the teacher refused it: token_ids holds id 151900, the model has 151669"
    assert {q.reason for q in quarantined} == {reason}


def test_a_support_of_the_whole_vocabulary_has_an_empty_tail() -> None:
    logprobs = np.log(np.full((3, 4), 0.25))
    rollout = sample(0, 2, 3).rollout
    empty = changed(
        rollout=replace(rollout, completion=replace(rollout.completion, token_ids=np.array([3, 0, 1], np.int32))),
        teacher_token_logprobs=logprobs[:, 0],
        teacher_support_logprobs=logprobs,
        teacher_tail_logprob=np.full(3, -np.inf),
        support_ids=np.tile(np.arange(4), (3, 1)),
    )
    assert defect(empty, Support("teacher_topk", 4, 4)) is None
    assert "no finite logprob" in (defect(empty, SUPPORT) or "")


async def test_the_teacher_is_asked_about_the_students_likeliest_tokens() -> None:
    random = np.random.default_rng(0)
    rollouts, shares = [], []
    for original in (sample(1, 2, 3), sample(2, 4, 5)):
        length = len(original.rollout.completion.token_ids)
        topk = np.stack([random.permutation(VOCAB)[:2] for _ in range(length)]).astype(np.int32)
        completion = replace(original.rollout.completion, student_topk_ids=topk)
        rollouts.append(replace(original.rollout, completion=completion))
        shares.append(np.log(random.dirichlet(np.ones(3), length)))
    rows = np.concatenate(shares)

    class Scorer:
        async def score(self, sequences: list, **options: object) -> TeacherScores:
            self.options = options
            one = np.zeros((len(rows), 1))
            offsets = np.array([0, 3, 8])
            return TeacherScores(
                "t",
                "f",
                1.0,
                1,
                offsets,
                np.concatenate([r.completion.token_ids for r in rollouts]),
                rows[:, 2] - 1,
                one.astype(np.int32),
                one,
                rows[:, 0],
                rows[:, 0],
                rows[:, :2],
                rows[:, 2],
            )

    teacher = Scorer()
    support = Support("student_topk", 2, VOCAB)
    assert support.student_top_k == 2
    samples, quarantined = await scored(alone(teacher), rollouts, support=support, temperature=0.5)
    assert callable(teacher.options.pop("on_refused"))
    assert teacher.options == {
        "top_k": 1,
        "temperature": 0.5,
        "support_ids": [r.completion.student_topk_ids.tolist() for r in rollouts],
        "on_mismatch": "keep",
    }
    assert quarantined == []
    for found, rollout, share in zip(samples, rollouts, shares, strict=True):
        assert found.support_ids.tolist() == rollout.completion.student_topk_ids.tolist()
        assert found.teacher_support_logprobs.tolist() == share[:, :2].tolist()
        assert found.teacher_tail_logprob.tolist() == share[:, 2].tolist()


async def test_a_rollout_without_the_top_k_that_was_asked_for_is_an_error() -> None:
    support = Support("student_topk", 2, VOCAB)
    with pytest.raises(PeerError, match=r"no student top-k.*student_topk"):
        await scored(alone(Teacher([])), [sample(1, 2, 3).rollout], support=support, temperature=1.0)


def set_aside() -> Quarantined:
    rollout = sample(7, 2, 3).rollout
    return Quarantined(rollout.prompt, rollout.completion, "because")


def test_quarantined_samples_are_written_and_counted(tmp_path: Path) -> None:
    quarantine, bad = Quarantine(tmp_path / "q.jsonl", max_rate=0.5), set_aside()
    quarantine.add([], 10)
    assert not (tmp_path / "q.jsonl").exists()
    quarantine.add([bad, bad], 4)
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0] == {"row": 7, "reason": "because", "completion": bad.completion.token_ids.tolist()}


def test_too_many_of_them_stop_the_run(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", max_rate=0.1)
    with pytest.raises(PeerError, match=r"1 of 4 completions.*because.*max_quarantine_rate = 0\.1"):
        quarantine.add([set_aside()], 4)
    assert (tmp_path / "q.jsonl").read_text().count("\n") == 1


def test_a_tail_that_is_one_minus_the_rest_may_be_rounded() -> None:
    """The sampled token is all of a tail of 2e-5, which float32 sums of the candidates give as 1.5e-5."""
    tail = np.full(3, np.log(1.5e-5), np.float32)
    outside = next(i for i in range(VOCAB) if not (sample(0, 2, 3).support_ids == i).any())
    original = sample(0, 2, 3)
    completion = replace(original.rollout.completion, token_ids=np.full(3, outside, np.int32))
    rounded = ScoredSample(
        replace(original.rollout, completion=completion),
        teacher_token_logprobs=np.full(3, np.log(2e-5), np.float32),
        support_ids=original.support_ids,
        teacher_support_logprobs=np.log(np.full((3, TOP_K), 0.25, np.float32)),
        teacher_tail_logprob=tail,
    )
    assert defect(rounded, SUPPORT) is None
