"""The teacher's client when work is too large, a replica fails, or replicas differ; see test_clients for the rest."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from services.clients import TeacherClient, teacher_requests
from services.clients import teacher as teacher_client
from services.clients.teacher import RefusedSequenceError
from services.clients.teacher_answers import mismatches, without_sequences
from services.errors import OutageError, PeerError, ProblemError
from services.wire.teacher import TeacherScores
from tests.scripted_teacher import INFO
from tests.unit.services.clients.answers import scored, scores_for

A, B, C = "http://a:1", "http://b:2", "http://c:3"
Handler = Callable[[httpx.Request], Any]


def teacher(handler: Handler, *urls: str) -> TeacherClient:
    return TeacherClient(list(urls or (A,)), transport=httpx.MockTransport(handler))


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    really_sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda _: really_sleep(0))


def size(request: httpx.Request) -> int:
    return len(json.loads(request.content)["sequences"])


SEQUENCES = [([9, i], 1) for i in range(1, 8)]
TOO_LARGE = httpx.Response(413, json={"title": "Over a limit", "detail": "at most 2 are served"})


async def test_what_is_too_large_is_cut_until_it_fits_and_keeps_its_order() -> None:
    sizes: list[int] = []

    def at_most_two(request: httpx.Request) -> httpx.Response:
        sizes.append(size(request))
        return scored(request) if sizes[-1] <= 2 else TOO_LARGE

    scores = await teacher(at_most_two).score(SEQUENCES, top_k=2)
    assert scores.token_logprobs.tolist() == [-1, -2, -3, -4, -5, -6, -7]
    assert scores.row_offsets.tolist() == list(range(8))
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


async def test_one_sequence_that_is_too_large_is_the_callers_problem() -> None:
    asked: list[int] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(size(request))
        return TOO_LARGE

    with pytest.raises(ProblemError, match=r"http://a:1/v1/teacher/logprobs answered 413: at most 2 are served"):
        await teacher(refuse).score(SEQUENCES[:2], top_k=2)
    assert asked == [2, 1]


async def test_support_ids_travel_with_their_sequences() -> None:
    support = [[[10 * i, i]] for i in range(1, 8)]
    client = teacher(scored, A, B)
    scores = await client.score(SEQUENCES, top_k=1, support_ids=support, max_rows_per_request=2)
    assert scores.support_logprobs is not None and scores.support_tail_logprobs is not None
    assert scores.support_logprobs.tolist() == [[-10 * i, -i] for i in range(1, 8)]
    assert scores.support_tail_logprobs.tolist() == [-i for i in range(1, 8)]


@pytest.mark.parametrize(
    "changes",
    [{"support_logprobs": None}, {"support_logprobs": np.zeros((1, 3), np.float32)}, {"support_tail_logprobs": None}],
)
async def test_an_answer_without_the_support_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PeerError, match=r"http://a:1.* sent support_"):
        await teacher(lambda r: scored(r, **changes)).score(SEQUENCES[:1], top_k=1, support_ids=[[[1, 2]]])


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.Response(503), httpx.Response(500)])
async def test_replicas_take_over_from_one_that_is_down(failure: httpx.Response | Exception) -> None:
    calls: Counter[str] = Counter()

    def only_c_lives(request: httpx.Request) -> httpx.Response:
        calls[request.url.host] += 1
        if request.url.host == "c":
            return scored(request)
        if isinstance(failure, Exception):
            raise failure
        return failure

    scores = await teacher(only_c_lives, A, B, C).score(SEQUENCES[:3], top_k=1)
    assert scores.token_logprobs.tolist() == [-1, -2, -3]
    # Three requests, dealt out one each; all of a and b go elsewhere at once, and after three failures nobody asks them.
    assert calls["c"] == 3 and calls["a"] <= 3 and calls["b"] <= 3


async def test_answers_of_different_models_are_not_mixed() -> None:
    message = r"do not serve the same model: m \(a\) answered from http://a:1, m \(b\) from http://b:2"
    with pytest.raises(PeerError, match=message):
        await teacher(lambda r: scored(r, fingerprint=r.url.host), A, B).score(SEQUENCES, top_k=1)


async def test_a_server_that_comes_back_with_another_model_is_refused() -> None:
    fingerprints = iter("aab")
    client = teacher(lambda r: scored(r, fingerprint=next(fingerprints)))
    for _ in range(2):
        await client.score(SEQUENCES, top_k=1)
    with pytest.raises(PeerError, match=r"m \(a\) answered from http://a:1, m \(b\) from http://a:1"):
        await client.score(SEQUENCES, top_k=1)


async def test_a_refused_sequence_is_named_by_its_place_among_all() -> None:
    """Also where it was refused as part of a piece."""

    def refuse_five(request: httpx.Request) -> httpx.Response:
        last_ids = [s["token_ids"][-1] for s in json.loads(request.content)["sequences"]]
        if len(last_ids) > 2:
            return TOO_LARGE
        if 5 not in last_ids:
            return scored(request)
        problem = {"detail": "too long", "field": f"sequences.{last_ids.index(5)}.token_ids"}
        return httpx.Response(422, json=problem)

    with pytest.raises(RefusedSequenceError, match="answered 422: too long") as caught:
        await teacher(refuse_five).score(SEQUENCES, top_k=1)
    assert SEQUENCES[caught.value.index] == ([9, 5], 1)


@pytest.mark.parametrize("field", ["top_k", "sequences", "sequences.7.token_ids", None])
async def test_what_is_not_a_problem_of_a_sequence_is_not_called_one(field: str | None) -> None:
    refusal = httpx.Response(422, json={"detail": "no", "field": field})
    with pytest.raises(ProblemError, match="answered 422: no") as caught:
        await teacher(lambda _: refusal).score(SEQUENCES, top_k=1)
    assert not isinstance(caught.value, RefusedSequenceError)


async def test_rows_of_other_tokens_can_be_left_to_the_caller() -> None:
    shifted = np.array([2, 3, 4, 5, 6, 7, 1], np.int32)
    scores = await teacher(lambda r: scored(r, token_ids=shifted)).score(SEQUENCES, top_k=1, on_mismatch="keep")
    assert scores.token_ids.tolist() == shifted.tolist()
    assert mismatches(scores, SEQUENCES)[2] == "the teacher scored token 4 in row 0, asked was 3"


def test_of_text_only_the_absence_of_rows_is_a_mismatch() -> None:
    rows, ids = np.zeros(2), np.array([7, 8])
    scores = TeacherScores("m", "f", 1.0, 1, np.array([0, 2, 2]), ids, rows, ids[:, None], rows[:, None], rows, rows)
    assert mismatches(scores, [None, None]) == {1: "the teacher scored none of its tokens"}


@pytest.mark.parametrize("content", [b"", b"<html>", b'{"sequences": []}'])
async def test_an_unreadable_answer_names_its_server(content: bytes) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=content))
    with pytest.raises(
        OutageError, match=r"http://a:1 answered with what is not scores: .* not a safetensors document"
    ):
        await TeacherClient([A], transport=transport, outage_s=0.0).score(SEQUENCES, top_k=1)


async def test_a_bounded_number_of_requests_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_client, "_SCORES_IN_FLIGHT", 2)
    under_way, most = 0, 0

    async def slow(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(20):
            await asyncio.sleep(0)
        under_way -= 1
        return scored(request)

    scores = await teacher(slow).score(SEQUENCES, top_k=1, max_rows_per_request=1)
    assert len(scores.token_logprobs) == 7 and most == 2


def refuse_some(*refused: int) -> Handler:
    """Answers, unless an id is among `refused`: then the first such sequence is named, as our server does."""

    def handler(request: httpx.Request) -> httpx.Response:
        last_ids = [s["token_ids"][-1] for s in json.loads(request.content)["sequences"]]
        bad = next((index for index, token in enumerate(last_ids) if token in refused), None)
        if bad is None:
            return scored(request)
        problem = {"detail": f"sequences.{bad}.token_ids holds {last_ids[bad]}", "field": f"sequences.{bad}.token_ids"}
        return httpx.Response(422, json=problem)

    return handler


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize("refused", [(), (1,), (7,), (2, 3), (1, 4, 7), (1, 2, 3, 5, 6, 7)])
async def test_refused_sequences_have_no_rows_and_the_others_keep_theirs(refused: tuple[int, ...], limit: int) -> None:
    told: dict[int, str] = {}
    scores = await teacher(refuse_some(*refused), A, B).score(
        SEQUENCES,
        top_k=1,
        max_rows_per_request=limit,
        support_ids=[[[i, 10]] for i in range(1, 8)],
        on_refused=lambda index, error: told.update({index: error.reason}),
    )
    assert told == {i - 1: f"token_ids holds {i}" for i in refused}
    kept = [i for i in range(1, 8) if i not in refused]
    assert np.diff(scores.row_offsets).tolist() == [int(i in kept) for i in range(1, 8)]
    assert scores.token_ids.tolist() == kept and scores.token_logprobs.tolist() == [-i for i in kept]
    assert scores.support_logprobs is not None and scores.support_logprobs.tolist() == [[-i, -10] for i in kept]
    assert without_sequences(scores, told).row_offsets.tolist() == list(range(len(kept) + 1))


@pytest.mark.parametrize("has_asked_before", [True, False])
async def test_when_all_are_refused_the_answer_is_an_empty_one(has_asked_before: bool) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/teacher/info":
            return httpx.Response(200, json={**INFO.model_dump(), "model": "m", "fingerprint": "f"})
        return refuse_some(*range(8))(request)

    client = teacher(handler, A, B)
    if has_asked_before:
        await client.info()
    told: list[int] = []
    options: dict[str, Any] = {"on_refused": lambda index, _: told.append(index), "temperature": 0.5}
    scores = await client.score(SEQUENCES, top_k=3, support_ids=[[[1, 2]]] * 7, **options)
    assert sorted(told) == list(range(7)) and scores.row_offsets.tolist() == [0] * 8
    assert (scores.model, scores.fingerprint, scores.top_k, scores.temperature) == ("m", "f", 3, 0.5)
    body = {"sequences": [{"token_ids": [9, 1], "prompt_length": 1, "support_ids": [[1, 2]]}]}
    like = scores_for({**body, "top_k": 3, "temperature": 0.5})
    assert {n: (c.dtype, c.shape[1:]) for n, c in scores.columns().items()} == {
        n: (c.dtype, c.shape[1:]) for n, c in like.columns().items()
    }
    assert mismatches(scores, SEQUENCES).keys() == set(range(7))


async def test_very_many_refused_sequences_are_no_deep_recursion() -> None:
    told: list[int] = []
    sequences = [([9, 1 if i % 3 else 2], 1) for i in range(1800)]  # 1200 refused: above the limit of recursion
    handler = refuse_some(1)

    def whole(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if len(body["sequences"]) > 600:  # one by one, and nothing is cut
            bad = next(i for i, s in enumerate(body["sequences"]) if s["token_ids"][-1] == 1)
            return httpx.Response(422, json={"detail": "no", "field": f"sequences.{bad}"})
        return handler(request)

    scores = await teacher(whole).score(sequences, top_k=1, on_refused=lambda index, _: told.append(index))
    assert told == [i for i in range(1800) if i % 3] and len(scores.token_ids) == 600


async def test_a_single_sequence_that_is_too_large_is_a_refused_one() -> None:
    def at_most_20_ids(request: httpx.Request) -> httpx.Response:
        ids = [s["token_ids"] for s in json.loads(request.content)["sequences"]]
        return scored(request) if sum(map(len, ids)) <= 20 else TOO_LARGE

    told: dict[int, str] = {}
    sequences = [([9, 1], 1), ([9] * 30, 1), ([9, 3], 1)]
    scores = await teacher(at_most_20_ids).score(
        sequences, top_k=1, on_refused=lambda index, error: told.update({index: error.reason})
    )
    assert told == {1: "at most 2 are served"} and scores.row_offsets.tolist() == [0, 1, 1, 2]


async def test_a_problem_of_the_whole_request_is_no_refused_sequence() -> None:
    refusal = httpx.Response(422, json={"detail": "top_k is above 4", "field": "top_k"})
    told: list[int] = []
    with pytest.raises(ProblemError, match="top_k is above 4"):
        await teacher(lambda _: refusal).score(SEQUENCES, top_k=9, on_refused=lambda index, _: told.append(index))
    assert told == []


async def test_a_request_has_a_bounded_number_of_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_requests, "_IDS_PER_REQUEST", 10)
    sizes: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sequences = json.loads(request.content)["sequences"]
        sizes.append(sum(len(s["token_ids"]) + sum(map(len, s["support_ids"])) for s in sequences))
        return scored(request)

    scores = await teacher(handler).score(SEQUENCES, top_k=1, support_ids=[[[i, 1, 2]] for i in range(7)])
    assert sizes == [10, 10, 10, 5] and scores.token_ids.tolist() == list(range(1, 8))


# ---------------------------------------------------------------------------------------------- outages


def timed(handler: Handler, clock: SimpleNamespace, *urls: str, **options: Any) -> TeacherClient:
    transport = httpx.MockTransport(handler)
    return TeacherClient(list(urls or (A,)), transport=transport, clock=lambda: clock.now, **options)


async def test_an_outage_is_sat_out_with_growing_waits(clock: SimpleNamespace) -> None:
    def down_until_290(request: httpx.Request) -> httpx.Response:
        if clock.now < 390.0:
            raise httpx.ConnectError("refused")
        return scored(request)

    scores = await timed(down_until_290, clock).score(SEQUENCES, top_k=1)
    assert len(scores.token_logprobs) == 7 and 390 <= clock.now < 400
    lowest = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, *[10.0] * 100]
    for low, wait in zip(lowest, clock.waits, strict=False):
        assert low <= wait <= min(10.0, low + 1.0)


async def test_an_outage_that_lasts_names_the_teachers_the_time_and_the_reasons(clock: SimpleNamespace) -> None:
    asked_at: list[float] = []

    def down(request: httpx.Request) -> httpx.Response:
        asked_at.append(clock.now)
        if request.url.host == "a":
            raise httpx.ConnectError("refused")
        return httpx.Response(503, json={"detail": "the engine failed"})

    message = (
        r"no teacher has answered for 60 s \(teacher_client.outage_s\): http://a:1 cannot be reached: ConnectError refused; "
        r"http://b:2 answered 503 \(the engine failed\)"
    )
    with pytest.raises(PeerError, match=message):
        await timed(down, clock, A, B, outage_s=60.0).score(SEQUENCES, top_k=1, max_rows_per_request=100)
    assert asked_at[-1] == pytest.approx(160.0)  # a last time at the end


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_respected_up_to_the_end_of_the_outage(status: int, clock: SimpleNamespace) -> None:
    answers = [httpx.Response(status, headers={"Retry-After": seconds}) for seconds in ("40", "1e12", "7")]
    asked_at: list[float] = []

    def busy(request: httpx.Request) -> httpx.Response:
        asked_at.append(clock.now)
        return answers.pop(0)

    with pytest.raises(PeerError, match=rf"no teacher has answered for 90 s .*http://a:1 answered {status}"):
        await timed(busy, clock, outage_s=90.0).score(SEQUENCES, top_k=1)
    assert asked_at[0] == 100 and 140 <= asked_at[1] <= 150 and asked_at[2] == pytest.approx(190.0)


async def test_a_busy_replica_is_left_alone_and_the_other_takes_the_work_at_once(clock: SimpleNamespace) -> None:
    calls: Counter[str] = Counter()

    def handler(request: httpx.Request) -> httpx.Response:
        calls[request.url.host] += 1
        if request.url.host == "a":
            return httpx.Response(429, headers={"Retry-After": "30"})
        return scored(request)

    client = timed(handler, clock, A, B)
    for _ in range(5):
        await client.score(SEQUENCES, top_k=1, max_rows_per_request=100)
    assert calls == {"a": 1, "b": 5} and clock.waits == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422])
async def test_no_replica_is_asked_again_what_one_has_refused(status: int, clock: SimpleNamespace) -> None:
    calls: Counter[str] = Counter()

    def refuse(request: httpx.Request) -> httpx.Response:
        calls[request.url.host] += 1
        return httpx.Response(status, json={"detail": "no"})

    with pytest.raises(ProblemError, match=f"answered {status}: no"):
        await timed(refuse, clock, A, B, C).score(SEQUENCES, top_k=1, max_rows_per_request=100)
    assert calls == {"a": 1} and clock.waits == []


async def test_an_error_ends_the_other_requests_of_the_same_call(clock: SimpleNamespace) -> None:
    """Nothing goes on asking in the background for somebody who has been told already."""
    under_way = 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal under_way
        if json.loads(request.content)["sequences"][0]["token_ids"] == [9, 1]:
            return httpx.Response(422, json={"detail": "no"})
        under_way += 1
        try:
            await asyncio.Event().wait()
        finally:
            under_way -= 1
        raise AssertionError

    with pytest.raises(ProblemError, match="answered 422"):
        await timed(handler, clock).score(SEQUENCES, top_k=1, max_rows_per_request=1)
    assert under_way == 0


async def test_a_replica_that_returns_is_used_again(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="services.clients.replicas")
    calls: Counter[str] = Counter()

    def handler(request: httpx.Request) -> httpx.Response:
        calls[request.url.host] += 1
        if request.url.host == "a" and clock.now < 110:
            raise httpx.ReadTimeout("")
        return httpx.Response(200) if request.method == "GET" else scored(request)

    client = timed(handler, clock, A, B)
    for _ in range(50):
        await client.score(SEQUENCES, top_k=1, max_rows_per_request=100)
        clock.now += 0.5
    assert calls["b"] < 50 < calls["a"] + calls["b"] < 60
    assert [record.getMessage().split(" for ")[0].split(" after ")[0] for record in caplog.records] == [
        "http://a:1 is left alone",
        "http://a:1 is back",
    ]
