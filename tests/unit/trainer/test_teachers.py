"""Several teachers in one run: every rollout is scored by its own, and what goes wrong says with which."""

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from services.clients import TeacherClient
from services.config import RunConfig
from services.errors import ConfigError, PeerError, ProblemError
from services.wire.teacher import TeacherScores, encode_scores
from tests.scripted_teacher import VOCAB, logprobs_of, scores_of
from tests.unit.trainer.attached import attached, scored
from tests.unit.trainer.teachers_choices import LENGTH, ROLLOUTS
from trainer.data.prompts import Prompt
from trainer.groups import Rollout
from trainer.teacher_scores import Support
from trainer.teachers import Teachers, teacher_urls

NAMES = [None, "maths", "code"]
FLATNESS = {None: 1.0, "maths": 2.0, "code": 3.0}
"""What each teacher divides its logits by, besides the temperature it is asked for."""
SUPPORTS = [Support("teacher_topk", 8, VOCAB), Support("student_topk", 5, VOCAB)]

Spoil = Callable[[TeacherScores], TeacherScores]


def of_teachers(names: list[str | None]) -> list[Rollout]:
    """The first rollouts, each of a prompt that names its teacher, with a student's top-k of its own."""
    rollouts = []
    for rollout, name in zip(ROLLOUTS, names, strict=False):
        ids = np.argsort(logprobs_of(rollout.sequence, 3, 5.0))[:, -5:].astype(np.int32)
        completion = replace(rollout.completion, student_topk_ids=ids)
        rollouts.append(Rollout(replace(rollout.prompt, teacher=name), completion, 0))
    return rollouts


def answer(request: httpx.Request, name: str | None, spoil: Spoil = lambda scores: scores) -> httpx.Response:
    """What the teacher of that name says, support ids included."""
    body = json.loads(request.content)
    temperature = body["temperature"] * FLATNESS[name]
    scores = replace(scores_of({**body, "temperature": temperature}), temperature=body["temperature"])
    if "support_ids" in body["sequences"][0]:
        ids = np.concatenate([s["support_ids"] for s in body["sequences"]])
        dense = np.concatenate(
            [logprobs_of(s["token_ids"], s["prompt_length"], temperature) for s in body["sequences"]]
        )
        logprobs = np.take_along_axis(dense, ids, 1).astype(np.float32)
        tails = np.log1p(-np.exp(logprobs).sum(1))
        scores = replace(scores, support_logprobs=logprobs, support_tail_logprobs=tails)
    scores = replace(scores, model=f"model of {name}", fingerprint=f"of {name}")
    return httpx.Response(200, content=encode_scores(spoil(scores)))


def teachers(**handlers: Callable[[httpx.Request], Any]) -> Teachers:
    """All three; `handlers` take the place of some."""

    def client(name: str | None) -> TeacherClient:
        handler = handlers.get(str(name), lambda request: answer(request, name))
        ticks = itertools.count(0.0, 30.0)  # half a minute passes whenever somebody looks
        transport = httpx.MockTransport(handler)
        return TeacherClient([f"http://{name}:1"], transport=transport, clock=lambda: next(ticks), outage_s=60.0)

    return Teachers([attached(client(name), name=name) for name in NAMES])


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    really_sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda _: really_sleep(0))


def test_prompts_are_split_by_teacher_in_their_order() -> None:
    names = ["code", None, "code", "code", None]
    own, _, code = all_of = teachers()
    assert own in all_of
    split = all_of.split(Prompt(row, [1], "", teacher=name) for row, name in enumerate(names))
    assert split == [(code, [0, 2, 3]), (own, [1, 4])]


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda support: support.kind)
@pytest.mark.parametrize(
    "names",
    [NAMES * 4, ["code", "code", None, "maths", None, "maths"], ["maths"] * 5, [None] * 5],
    ids=["in turns", "mixed", "one of several", "none"],
)
async def test_every_rollout_gets_the_rows_of_its_own_teacher(names: list[str | None], support: Support) -> None:
    rollouts = of_teachers(names)
    samples, quarantined = await scored(teachers(), rollouts, support=support, temperature=0.5)
    assert [s.rollout for s in samples] == rollouts and quarantined == []
    for sample, name in zip(samples, names, strict=True):
        dense = logprobs_of(sample.rollout.sequence, 3, 0.5 * FLATNESS[name])
        tokens = sample.rollout.completion.token_ids
        expected = sample.rollout.completion.student_topk_ids
        if support.kind == "teacher_topk":
            expected = np.argsort(-dense, axis=1, kind="stable")[:, : support.size]
        assert expected is not None and sample.support_ids.tolist() == expected.tolist()
        logprobs = np.take_along_axis(dense, expected, 1)
        close = {"rtol": 0.0, "atol": 1e-5}
        np.testing.assert_allclose(sample.teacher_token_logprobs, dense[np.arange(LENGTH), tokens], **close)
        np.testing.assert_allclose(sample.teacher_support_logprobs, logprobs, **close)
        np.testing.assert_allclose(np.exp(sample.teacher_tail_logprob), 1 - np.exp(logprobs).sum(1), **close)


async def test_each_teacher_is_asked_once_and_only_about_its_own() -> None:
    asked: dict[str, list[int]] = {}

    def remembering(name: str | None) -> Callable[[httpx.Request], httpx.Response]:
        def handler(request: httpx.Request) -> httpx.Response:
            rows = [s["token_ids"][2] for s in json.loads(request.content)["sequences"]]
            assert asked.setdefault(str(name), rows) is rows
            return answer(request, name)

        return handler

    rollouts = of_teachers([None, "maths", "maths", None])  # their third tokens are 0, 1, 2, 3
    all_of = teachers(**{str(name): remembering(name) for name in NAMES})
    await scored(all_of, rollouts, support=SUPPORTS[0], temperature=1.0)
    assert asked == {"None": [0, 3], "maths": [1, 2]}


async def test_teachers_work_at_the_same_time() -> None:
    """Neither answers before the other one has been asked."""
    both_asked = asyncio.Barrier(2)

    def waiting(name: str | None) -> Callable[[httpx.Request], Any]:
        async def handler(request: httpx.Request) -> httpx.Response:
            async with asyncio.timeout(10.0), both_asked:
                return answer(request, name)

        return handler

    all_of = teachers(maths=waiting("maths"), code=waiting("code"))
    samples, _ = await scored(all_of, of_teachers(["maths", "code"]), support=SUPPORTS[0], temperature=1.0)
    assert len(samples) == 2


async def test_the_rollout_whose_rows_are_spoilt_is_set_aside_with_its_teachers_name() -> None:
    def second_is_not_finite(scores: TeacherScores) -> TeacherScores:
        logprobs = scores.token_logprobs.copy()
        logprobs[LENGTH] = -np.inf
        return replace(scores, token_logprobs=logprobs)

    rollouts = of_teachers(["code", "maths", "code", "maths", None])
    all_of = teachers(maths=lambda request: answer(request, "maths", second_is_not_finite))
    samples, quarantined = await scored(all_of, rollouts, support=SUPPORTS[0], temperature=1.0)
    assert [s.rollout for s in samples] == [rollouts[0], rollouts[1], rollouts[2], rollouts[4]]
    assert [(q.prompt, q.completion) for q in quarantined] == [(rollouts[3].prompt, rollouts[3].completion)]
    assert quarantined[0].reason.startswith("teacher_client.named.maths: the teacher gave a logprob that is not finite")


async def test_an_outage_of_one_teacher_ends_the_step_and_names_it() -> None:
    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    message = (
        r"^teacher_client\.named\.code: no teacher has answered for 60 s \(teacher_client.outage_s\): "
        r"http://code:1 cannot be reached: ConnectError refused; to wait longer, raise teacher_client.outage_s"
    )
    with pytest.raises(PeerError, match=message):
        await scored(teachers(code=down), of_teachers(NAMES), support=SUPPORTS[0], temperature=1.0)


async def test_the_outage_of_a_teacher_that_no_rollout_needs_is_no_matter() -> None:
    def unexpected(request: httpx.Request) -> httpx.Response:
        raise AssertionError("nobody had a question")

    rollouts = of_teachers([None, "maths"])
    samples, _ = await scored(teachers(code=unexpected), rollouts, support=SUPPORTS[0], temperature=1.0)
    assert len(samples) == 2


async def test_the_error_of_one_teacher_ends_the_requests_to_the_others() -> None:
    cancelled = asyncio.Event()
    asked = asyncio.Event()

    async def never(request: httpx.Request) -> httpx.Response:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    async def refuse(request: httpx.Request) -> httpx.Response:
        await asked.wait()
        return httpx.Response(422, json={"detail": "no"})

    all_of = teachers(maths=never, code=refuse)
    with pytest.raises(ProblemError, match=r"^teacher_client\.named\.code: http://code:1.* answered 422: no"):
        await scored(all_of, of_teachers(["maths", "code"]), support=SUPPORTS[0], temperature=1.0)
    assert cancelled.is_set()


async def test_a_teacher_that_becomes_another_model_is_refused_by_name() -> None:
    fingerprints = iter(["f", "g"])

    def changing(request: httpx.Request) -> httpx.Response:
        return answer(request, "maths", lambda scores: replace(scores, fingerprint=next(fingerprints)))

    all_of, rollouts = teachers(maths=changing), of_teachers(NAMES)
    await scored(all_of, rollouts, support=SUPPORTS[0], temperature=1.0)
    with pytest.raises(PeerError, match=r"^teacher_client\.named\.maths: the teachers do not serve the same model"):
        await scored(all_of, rollouts, support=SUPPORTS[0], temperature=1.0)


# ------------------------------------------------------------------------------------- which there are


NAMED = {"maths": ["http://a:1", "http://a:2"], "code": ["http://b:1"]}
CONFIG = RunConfig(teacher_client={"named": NAMED})


def test_the_sections_own_servers_are_a_teacher_only_of_rows_that_name_none() -> None:
    assert teacher_urls(CONFIG, {"maths", "code"}) == NAMED
    own = {None: ["http://127.0.0.1:8101"]}
    assert teacher_urls(CONFIG, {None, "maths", "code"}) == {**own, **NAMED}
    assert teacher_urls(RunConfig(), {None}) == teacher_urls(RunConfig(), set()) == own


def test_a_teacher_that_no_row_names_is_attached_all_the_same_and_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    assert list(teacher_urls(CONFIG, {None, "code"})) == [None, "maths", "code"]
    assert [record.getMessage() for record in caplog.records] == [
        "no row names the teacher 'maths' of teacher_client.named"
    ]


def test_rows_without_a_teacher_are_not_scored_by_a_named_one_that_happens_to_have_their_port() -> None:
    config = RunConfig(teacher_client={"named": {"maths": ["http://127.0.0.1:8101/"]}})
    assert list(teacher_urls(config, {"maths"})) == ["maths"]
    message = r"teacher_client\.named\.maths names http://127\.0\.0\.1:8101, where rows without a teacher are scored.*teacher_client\.urls"
    with pytest.raises(ConfigError, match=message):
        teacher_urls(config, {None, "maths"})
