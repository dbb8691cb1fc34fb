"""The clients against scripted servers: what is retried and when, how work is spread, what is not believed."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from services.clients import RolloutClient, TeacherClient, rollout_requests
from services.clients.teacher_requests import cut_by_rows
from services.errors import PeerError, ProblemError
from services.wire.frames import END_OF_STREAM
from services.wire.rollout import RolloutSampling, encode_stream_error
from tests.scripted_teacher import INFO
from tests.servers import rollout_info
from tests.unit.services.clients.answers import completed, frame, scored, scores_for

A, B = "http://a:1", "http://b:2"
Handler = Callable[[httpx.Request], Any]


class Script:
    """Answers requests with a list of answers in turn, an exception standing for a broken connection."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def teacher(handler: Handler, urls: tuple[str, ...] = (A,), **options: Any) -> TeacherClient:
    return TeacherClient(list(urls), transport=httpx.MockTransport(handler), **options)


def rollout(handler: Handler, urls: tuple[str, ...] = (A,), **options: Any) -> RolloutClient:
    return RolloutClient(list(urls), transport=httpx.MockTransport(handler), **options)


VOCABULARY = {"a": 0, "b": 1}


def ok() -> httpx.Response:
    return httpx.Response(200, json=VOCABULARY)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_an_error_that_may_pass_is_retried(status: int, waits: list[float]) -> None:
    script = Script(httpx.Response(status), httpx.Response(status), ok())
    assert await teacher(script).vocabulary() == VOCABULARY
    assert len(script.requests) == 3 and len(waits) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 422])
async def test_a_refusal_is_final(status: int, waits: list[float]) -> None:
    problem = {"title": "No", "detail": "top_k = 9 in top_k, at most 4 are served", "status": status}
    script = Script(httpx.Response(status, json=problem))
    with pytest.raises(ProblemError, match=f"{A}/v1/teacher/vocabulary answered {status}: top_k = 9") as caught:
        await teacher(script).vocabulary()
    assert (caught.value.status, caught.value.problem["title"]) == (status, "No")
    assert len(script.requests) == 1 and waits == []


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError, httpx.ReadError])
async def test_a_broken_connection_is_retried(error: type[httpx.TransportError], waits: list[float]) -> None:
    script = Script(error("gone"), ok())
    assert await teacher(script).vocabulary() == VOCABULARY
    assert len(script.requests) == 2 and len(waits) == 1


@pytest.mark.parametrize("attempts", [1, 3])
async def test_attempts_end_with_the_last_error(attempts: int, waits: list[float]) -> None:
    script = Script(*[httpx.Response(503, text=f"busy {i}") for i in range(attempts)])
    with pytest.raises(ProblemError, match=f"answered 503: busy {attempts - 1}"):
        await teacher(script, attempts=attempts).vocabulary()
    assert len(script.requests) == attempts and len(waits) == attempts - 1


async def test_a_server_that_cannot_be_reached_is_named(waits: list[float]) -> None:
    script = Script(*[httpx.ConnectError("refused")] * 3)
    with pytest.raises(PeerError, match=r"a:1.* cannot be reached: ConnectError refused"):
        await teacher(script, attempts=3).vocabulary()
    assert len(script.requests) == 3


async def test_a_bug_in_our_own_code_is_not_retried(waits: list[float]) -> None:
    script = Script(ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        await teacher(script).vocabulary()
    assert waits == []


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_respected_with_a_little_jitter(status: int, waits: list[float]) -> None:
    script = Script(httpx.Response(status, headers={"Retry-After": "40"}), ok())
    await teacher(script).vocabulary()
    assert len(waits) == 1 and 40 <= waits[0] <= 50


async def test_of_a_very_long_retry_after_five_minutes_are_believed(waits: list[float]) -> None:
    await rollout(
        Script(
            httpx.Response(503, headers={"Retry-After": "1e12"}), httpx.Response(200, json=rollout_info().model_dump())
        )
    ).info()
    assert len(waits) == 1 and 300 <= waits[0] <= 375


@pytest.mark.parametrize("header", [None, "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "inf", "nan", ""])
async def test_without_a_usable_retry_after_waits_grow_up_to_ten_seconds(
    header: str | None, waits: list[float]
) -> None:
    headers = {} if header is None else {"Retry-After": header}
    script = Script(*[httpx.Response(503, headers=headers) for _ in range(8)], ok())
    await teacher(script, attempts=9).vocabulary()
    # 0.2 s doubled each time, up to one second of jitter on top, at most 10 s
    lowest = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert len(waits) == 8
    for low, wait in zip(lowest, waits, strict=True):
        assert low <= wait <= min(10.0, low + 1.0)


@pytest.mark.parametrize("seconds", ["-3", "0"])
async def test_a_retry_after_that_is_over_shortens_no_wait(seconds: str, waits: list[float]) -> None:
    await teacher(Script(httpx.Response(429, headers={"Retry-After": seconds}), ok())).vocabulary()
    assert len(waits) == 1 and 0.2 <= waits[0] <= 1.2


@pytest.mark.parametrize("body", [b"", b"<html>Bad gateway</html>", b"[1]", b'"text"', b"\xff"])
async def test_an_error_that_is_no_problem_document_is_still_reported(body: bytes) -> None:
    with pytest.raises(ProblemError, match="answered 404") as caught:
        await teacher(Script(httpx.Response(404, content=body))).vocabulary()
    assert caught.value.status == 404


@pytest.mark.parametrize(("key", "expected"), [("s3cret", "Bearer s3cret"), (None, None), ("", None)])
async def test_the_key_travels_in_the_header(key: str | None, expected: str | None) -> None:
    script = Script(ok())
    await teacher(script, key=key).vocabulary()
    assert script.requests[0].headers.get("authorization") == expected
    assert "s3cret" not in str(script.requests[0].url)


# ------------------------------------------------------------------------------------------- readiness


async def test_wait_ready_polls_until_every_server_is_ready(clock: SimpleNamespace) -> None:
    polls: Counter[str] = Counter()

    def handler(request: httpx.Request) -> httpx.Response:
        polls[request.url.host] += 1
        if request.url.host == "a" and polls["a"] == 1:
            raise httpx.ConnectError("refused")
        return httpx.Response(503 if request.url.host == "a" and polls["a"] < 4 else 200)

    waited_for: list[str] = []
    await teacher(handler, (A, B)).wait_ready(60.0, on_wait=waited_for.append)
    assert polls == {"a": 4, "b": 1}
    assert waited_for == [A]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (httpx.Response(503), "it answers 503"),
        (httpx.ConnectError("refused"), "it cannot be reached: ConnectError refused"),
    ],
)
async def test_wait_ready_gives_up_after_its_time(
    answer: httpx.Response | Exception, problem: str, clock: SimpleNamespace
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(PeerError, match=f"{A} is not ready after 5 s: {problem}"):
        await teacher(handler).wait_ready(5.0)
    assert 105.0 < clock.now <= 106.0


# --------------------------------------------------------------------------------------------- teacher


async def test_info_comes_in_the_order_of_the_urls() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={**INFO.model_dump(), "model": request.url.host})

    assert [info.model for info in await teacher(handler, (B + "/", A)).info()] == ["b", "a"]


@pytest.mark.parametrize("content", [b"", b"{}", b"hello", json.dumps({**INFO.model_dump(), "surprise": 1}).encode()])
async def test_info_of_another_kind_is_refused(content: bytes) -> None:
    with pytest.raises(PeerError, match="is not a TeacherInfo"):
        await teacher(Script(httpx.Response(200, content=content)), attempts=1).info()


SEQUENCES = [([9, 9, 1, 2], 2), ([9, 3], 1), ([9, 4, 5, 6], 1), ([9, 9, 7], 2), ([9, 8, 10], 1)]
"""Completions of 2, 1, 3, 1 and 2 tokens, nine rows that hold 1, 2, 3, 4, 5, 6, 7, 8, 10."""


@pytest.mark.parametrize(
    ("urls", "limit", "expected"),
    [
        ((A,), None, [("a", 9)]),
        ((A, B), None, [("a", 3), ("b", 4), ("a", 2)]),  # at most ceil(9 / 2) = 5 rows: 2+1, 3+1, 2
        ((A, B), 3, [("a", 3), ("b", 3), ("a", 3)]),
        ((A, B), 1, [("a", 2), ("b", 1), ("a", 3), ("b", 1), ("a", 2)]),
        ((A, B), 1000, [("a", 9)]),
    ],
)
async def test_work_is_spread_and_its_order_kept(
    urls: tuple[str, ...], limit: int | None, expected: list[tuple[str, int]]
) -> None:
    shares: list[tuple[int, str, int]] = []

    async def handler(request: httpx.Request) -> httpx.Response:
        scores = scores_for(json.loads(request.content))
        shares.append((int(-scores.token_logprobs[0]), request.url.host, len(scores.token_logprobs)))
        for _ in range(20 - 2 * int(-scores.token_logprobs[0])):  # the first share is answered last
            await asyncio.sleep(0)
        return scored(request)

    got = await teacher(handler, urls).score(SEQUENCES, top_k=2, max_rows_per_request=limit)
    assert [(host, rows) for _, host, rows in sorted(shares)] == expected
    assert got.row_offsets.tolist() == [0, 2, 3, 6, 7, 9]
    assert got.token_logprobs.tolist() == [-1, -2, -3, -4, -5, -6, -7, -8, -10]
    assert got.topk_ids.tolist() == [[i, i] for i in (1, 2, 3, 4, 5, 6, 7, 8, 10)]
    assert got.topk_logprobs.shape == (9, 2) and got.entropies.shape == got.tail_logprobs.shape == (9,)


async def test_a_score_request_says_what_was_asked() -> None:
    requests: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return scored(request)

    await teacher(handler).score([([9, 1], 1)], top_k=3, temperature=0.5)
    (request,) = requests
    assert (request.method, str(request.url)) == ("POST", f"{A}/v1/teacher/logprobs")
    assert request.headers["accept"] == "application/x-safetensors"
    assert json.loads(request.content) == {
        "sequences": [{"token_ids": [9, 1], "prompt_length": 1}],
        "top_k": 3,
        "temperature": 0.5,
    }


async def test_only_the_share_that_failed_is_asked_again(waits: list[float]) -> None:
    calls: Counter[str] = Counter()

    def handler(request: httpx.Request) -> httpx.Response:
        calls[request.url.host] += 1
        if request.url.host == "b" and calls["b"] == 1:
            raise httpx.ReadError("gone")
        return scored(request)

    got = await teacher(handler, (A, B)).score([([9, 1], 1), ([9, 2], 1)], top_k=1)
    assert got.token_logprobs.tolist() == [-1, -2]
    assert calls == {"a": 2, "b": 1} and waits == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_offsets": np.array([0, 1, 3])}, "sequence 0: the teacher scored 1 of 2 tokens"),
        ({"row_offsets": np.array([0, 3])}, r"row_offsets of shape \(2,\) that do not part 2 sequences"),
        ({"row_offsets": np.array([], np.int64)}, "do not part 2 sequences"),
        ({"row_offsets": np.array([0, 4, 3])}, "do not part 2 sequences"),
        ({"row_offsets": np.array([1, 2, 3])}, "do not part 2 sequences"),
        ({"token_ids": np.array([2, 3, 3], np.int32)}, "sequence 0: the teacher scored token 2 in row 0, asked was 1"),
        ({"token_ids": np.array([1, 2, 4], np.int32)}, "sequence 1: the teacher scored token 4 in row 0, asked was 3"),
        ({"temperature": 0.5}, "temperature = 0.5, asked for 2, 1.0"),
        ({"top_k": 3}, "scored with top_k = 3"),
        ({"token_logprobs": np.zeros(2, np.float32)}, r"token_logprobs of shape \(2,\), expected \(3,\)"),
        ({"tail_logprobs": np.zeros((3, 1), np.float32)}, r"tail_logprobs of shape \(3, 1\)"),
        ({"entropies": np.zeros(4, np.float32)}, r"entropies of shape \(4,\)"),
        ({"topk_ids": np.zeros((3, 1), np.int32)}, r"topk_ids of shape \(3, 1\), expected \(3, 2\)"),
        ({"topk_logprobs": np.zeros((2, 2), np.float32)}, r"topk_logprobs of shape \(2, 2\)"),
    ],
)
async def test_an_answer_of_the_wrong_shape_is_refused(changes: dict[str, np.ndarray], message: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return scored(request, **changes)

    with pytest.raises(PeerError, match=message):
        await teacher(handler).score([([9, 1, 2], 1), ([9, 3], 1)], top_k=2)


@pytest.mark.parametrize("content", [b"", b"{}", b"<html>"])
async def test_an_answer_in_another_format_is_refused(content: bytes) -> None:
    with pytest.raises(PeerError, match="not a safetensors document"):
        await teacher(Script(httpx.Response(200, content=content)), outage_s=0.0).score([([9, 1], 1)], top_k=2)


@pytest.mark.parametrize(
    ("num_rows", "limit", "expected"),
    [
        ([2, 1, 3, 1, 2], 3, [(0, 2), (2, 3), (3, 5)]),
        ([2, 1, 3, 1, 2], 4, [(0, 2), (2, 4), (4, 5)]),
        ([5, 1, 1], 3, [(0, 1), (1, 3)]),
        ([1, 5, 1], 3, [(0, 1), (1, 2), (2, 3)]),
        ([1], 1, [(0, 1)]),
        ([3, 3], 6, [(0, 2)]),
    ],
)
def test_rows_are_cut_into_consecutive_slices(num_rows: list[int], limit: int, expected: list[tuple[int, int]]) -> None:
    assert [(part.start, part.stop) for part in cut_by_rows(num_rows, limit)] == expected


# --------------------------------------------------------------------------------------------- rollouts

SAMPLING = RolloutSampling(max_new_tokens=4, seed=7)


@pytest.mark.parametrize("urls", [(A,), (A, B), (A, B, "http://c:3")])
async def test_completions_come_in_the_order_of_prompts_and_samples(urls: tuple[str, ...]) -> None:
    prompts = [[10], [11], [12], [13], [14]]
    got = await rollout(completed, urls).generate(prompts, SAMPLING, samples_per_prompt=2)
    assert [(c.prompt_index, c.sample_index) for c in got] == [(p, s) for p in range(5) for s in range(2)]
    assert [c.token_ids.tolist() for c in got] == [[10 + p, 7 + s] for p in range(5) for s in range(2)]


async def test_prompts_are_dealt_in_turn_and_a_server_without_any_is_not_asked() -> None:
    bodies: dict[str, Any] = {}

    def handler(request: httpx.Request) -> httpx.Response:
        bodies[request.url.host] = json.loads(request.content)
        return completed(request)

    client = rollout(handler, (A, B))
    client.run = "mine"
    await client.generate([[1], [2], [3]], SAMPLING, student_top_k=5)
    assert {host: body["prompts"] for host, body in bodies.items()} == {"a": [[1], [3]], "b": [[2]]}
    assert bodies["b"] == {
        "prompts": [[2]],
        "samples_per_prompt": 1,
        "sampling": {"max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 7},
        "student_top_k": 5,
        "run": "mine",
    }
    bodies.clear()
    await rollout(handler, (A, B)).generate([[1]], SAMPLING)
    assert bodies.keys() == {"a"}


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "sent 0 of 2 completions"),
        ([frame(0, 0, 1)], "sent 1 of 2 completions"),
        ([frame(0, 0, 1), frame(0, 0, 1)], "sent sample 0 of prompt 0 twice, or unasked"),
        ([frame(0, 0, 1), frame(2, 0, 1)], "sent sample 0 of prompt 2 twice, or unasked"),
        ([frame(0, 0, 1), frame(1, 0, 1), frame(1, 1, 1)], "sent sample 1 of prompt 1 twice, or unasked"),
    ],
)
async def test_missing_doubled_and_invented_completions_are_refused(frames: list[bytes], reason: str) -> None:
    script = Script(httpx.Response(200, content=b"".join([*frames, END_OF_STREAM])))
    with pytest.raises(PeerError, match=f"{A} {reason}"):
        await rollout(script).generate([[1], [2]], SAMPLING)


async def test_a_rollout_stream_that_breaks_off_is_refused() -> None:
    with pytest.raises(PeerError, match="broke off"):
        await rollout(Script(httpx.Response(200, content=frame(0, 0, 1)))).generate([[1]], SAMPLING)


async def test_a_failure_in_mid_stream_is_reported_in_the_servers_words() -> None:
    content = frame(0, 0, 1) + encode_stream_error("the engine died")
    with pytest.raises(PeerError, match="the engine died"):
        await rollout(Script(httpx.Response(200, content=content))).generate([[1], [2]], SAMPLING)


async def test_a_busy_rollout_server_is_asked_again(waits: list[float]) -> None:
    good = httpx.Response(200, content=frame(0, 0, 1) + END_OF_STREAM)
    script = Script(httpx.Response(503, json={"detail": "busy"}), httpx.ReadError("gone"), good)
    assert len(await rollout(script).generate([[1]], SAMPLING)) == 1
    assert len(script.requests) == 3


async def test_a_refused_rollout_names_the_problem() -> None:
    script = Script(httpx.Response(422, json={"detail": "prompts.0 holds id 99", "field": "prompts.0"}))
    with pytest.raises(ProblemError, match=r"answered 422: prompts\.0 holds id 99") as caught:
        await rollout(script).generate([[99]], SAMPLING)
    assert caught.value.problem["field"] == "prompts.0"


class Server:
    """A rollout server that takes so many completions and ids at once."""

    def __init__(self, most: int, most_ids: int = 1 << 30) -> None:
        self.most, self.most_ids = most, most_ids
        self.asked: list[tuple[list[int], int, int | None]] = []
        self.under_way = self.most_under_way = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/rollouts/info":
            return httpx.Response(200, json=rollout_info(max_completions_per_request=self.most).model_dump())
        body = json.loads(request.content)
        prompts, samples, seed = body["prompts"], body["samples_per_prompt"], body["sampling"]["seed"]
        self.asked.append(([p[0] for p in prompts], samples, seed))
        if len(prompts) * samples > self.most or sum(map(len, prompts)) > self.most_ids:
            return httpx.Response(413, json={"detail": "send several requests"})
        self.under_way += 1
        self.most_under_way = max(self.under_way, self.most_under_way)
        for _ in range(5):
            await asyncio.sleep(0)
        self.under_way -= 1
        return completed(request)


@pytest.mark.parametrize("knows_the_limit", [True, False])
@pytest.mark.parametrize(("num_prompts", "samples"), [(1, 1), (7, 1), (9, 2), (25, 3), (3, 11), (1, 17), (40, 1)])
async def test_any_number_of_completions_is_cut_to_what_each_server_takes(
    num_prompts: int, samples: int, knows_the_limit: bool
) -> None:
    servers = {"a": Server(4), "b": Server(9)}
    client = rollout(lambda request: servers[request.url.host](request), (A, B))
    if knows_the_limit:
        await client.info()
    got = await client.generate([[10 + i] for i in range(num_prompts)], SAMPLING, samples)
    expected = [(p, s) for p in range(num_prompts) for s in range(samples)]
    assert [(c.prompt_index, c.sample_index) for c in got] == expected
    assert [c.token_ids.tolist() for c in got] == [[10 + p, 7 + s] for p, s in expected]
    for server in servers.values():
        sizes = [len(prompts) * num for prompts, num, _ in server.asked]
        assert server.most_under_way <= 1
        assert not knows_the_limit or max(sizes, default=0) <= server.most


async def test_prompts_are_cut_by_their_ids_and_what_is_still_too_large_in_halves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollout_requests, "MAX_IDS_PER_REQUEST", 6)
    server = Server(100, most_ids=4)
    client = rollout(server)
    got = await client.generate([[1, 0], [2, 0], [3, 0], [4, 0, 0, 0], [5]], SAMPLING)
    assert [prompts for prompts, _, _ in server.asked] == [[1, 2, 3], [1], [2, 3], [4, 5], [4], [5]]
    assert [c.token_ids[0] for c in got] == [1, 2, 3, 4, 5]
    with pytest.raises(ProblemError, match="answered 413: send several requests"):
        await client.generate([[1, 2, 3, 4, 5]], SAMPLING)


async def test_eight_thousand_prompts_need_no_thought() -> None:
    server = Server(1 << 20)
    got = await rollout(server).generate([[i] for i in range(8200)], SAMPLING)
    assert [c.token_ids[0] for c in got] == list(range(8200))
    assert [len(prompts) for prompts, _, _ in server.asked] == [4096, 4096, 8]


async def test_the_first_error_of_a_server_ends_the_work_of_the_others() -> None:
    under_way = 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal under_way
        if request.url.host == "b":
            return httpx.Response(422, json={"detail": "no"})
        under_way += 1
        try:
            await asyncio.Event().wait()
        finally:
            under_way -= 1
        raise AssertionError

    with pytest.raises(ProblemError, match=r"b:2.* answered 422: no"):
        await rollout(handler, (A, B)).generate([[1], [2]], SAMPLING)
    assert under_way == 0


async def test_a_canary_is_asked_once(waits: list[float]) -> None:
    for answer in (httpx.Response(503, json={"detail": "busy"}), httpx.ConnectError("refused")):
        script = Script(answer)
        with pytest.raises(PeerError, match=r"busy|cannot be reached: ConnectError refused"):
            await rollout(script, (A, B)).generate_on(B, [[1]], SAMPLING)
        assert [str(request.url) for request in script.requests] == [f"{B}/v1/rollouts"]
    assert [c.token_ids.tolist() for c in await rollout(completed).generate_on(A, [[5], [6]], SAMPLING)] == [
        [5, 7],
        [6, 7],
    ]
