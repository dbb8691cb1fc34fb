"""A teacher that comes back is asked what it was asked at the start, and is believed again when it answers the same."""

import asyncio
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from services.clients import TeacherClient
from services.clients.plain_vllm import VllmTeacherClient
from services.clients.teacher_probe import difference, is_uniform, probe_sequences
from services.errors import ChangedTeacherError, OutageError, PeerError, StartupError
from services.wire.teacher import TeacherScores, encode_scores
from tests.scripted_teacher import INFO, scores_of
from tests.virtual_time import in_virtual_time

A, B = "http://a:1", "http://b:2"
PROBE = probe_sequences([list(b"12+34=46"), list(b"7+8=15")])
WORK = [([50, 51, i], 1) for i in range(60, 66)]
Spoil = Callable[[TeacherScores], TeacherScores]


def uniform(scores: TeacherScores) -> TeacherScores:
    """As of a vLLM server whose weights were not loaded again after its sleep."""
    level = -np.log(261.0).astype(np.float32)
    return replace(
        scores,
        token_logprobs=np.full_like(scores.token_logprobs, level),
        topk_logprobs=np.full_like(scores.topk_logprobs, level),
    )


def other_weights(scores: TeacherScores) -> TeacherScores:
    return replace(scores, token_logprobs=scores.token_logprobs - np.float32(0.3))


def rounding(scores: TeacherScores) -> TeacherScores:
    return replace(scores, token_logprobs=scores.token_logprobs + np.float32(1e-3))


def same(scores: TeacherScores) -> TeacherScores:
    return scores


@dataclass
class Server:
    """A teacher that is up or down, and the sequences that it was asked: "probe" or "work"."""

    clock: SimpleNamespace
    spoil: Spoil = same
    info: Any = INFO
    is_down: Callable[[], bool] = lambda: False
    page: Callable[[httpx.Request], bytes | None] = lambda request: None
    """What is answered with success instead, as by a proxy."""
    asked: list[str] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.is_down():
            raise httpx.ConnectError("refused")
        if (page := self.page(request)) is not None:
            return httpx.Response(200, content=page)
        if request.method == "GET":
            return httpx.Response(200, json=self.info.model_dump())
        body = json.loads(request.content)
        first = body["sequences"][0]["token_ids"]
        self.asked.append("probe" if any(first == ids for ids, _ in PROBE) else "work")
        scores = replace(scores_of(body), model=self.info.model, fingerprint=self.info.fingerprint)
        return httpx.Response(200, content=encode_scores(self.spoil(scores)))


@pytest.fixture
def server(clock: SimpleNamespace) -> Server:
    return Server(clock)


async def probed(clock: SimpleNamespace, *servers: Server, **options: Any) -> TeacherClient:
    """A client of these servers, A and B, that keeps the probe."""
    hosts = dict(zip("ab", servers, strict=False))
    transport = httpx.MockTransport(lambda request: hosts[request.url.host](request))
    urls = [A, B][: len(servers)]
    client = TeacherClient(urls, transport=transport, clock=lambda: clock.now, **options)
    await client.keep_probe(PROBE)
    for one in servers:
        one.asked.clear()
    return client


def expected() -> np.ndarray:
    body = {"sequences": [{"token_ids": ids, "prompt_length": n} for ids, n in WORK], "temperature": 1.0, "top_k": 4}
    return scores_of(body).token_logprobs


async def score(client: TeacherClient) -> np.ndarray:
    return (await client.score(WORK, top_k=4, max_rows_per_request=100)).token_logprobs


async def test_a_teacher_of_which_much_was_heard_lately_is_not_probed(server: Server, clock: SimpleNamespace) -> None:
    client = await probed(clock, server)
    for _ in range(5):
        np.testing.assert_allclose(await score(client), expected())
        clock.now += 1.0
    assert server.asked == ["work"] * 5


async def test_after_a_silence_the_probe_comes_before_the_work(server: Server, clock: SimpleNamespace) -> None:
    client = await probed(clock, server)
    clock.now += 3.0
    await score(client)
    await score(client)
    assert server.asked == ["probe", "work", "work"]


async def test_whoever_wants_a_probe_gets_one_before_the_next_work(server: Server, clock: SimpleNamespace) -> None:
    client = await probed(clock, server)
    client.distrust()
    await score(client)
    assert server.asked == ["probe", "work"]


async def test_a_teacher_away_for_a_minute_costs_the_minute_and_is_asked_everything_once(
    server: Server, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    client = await probed(clock, server)
    began = clock.now
    server.is_down = lambda: clock.now < began + 60.0
    np.testing.assert_allclose(await score(client), expected())
    assert 60.0 <= clock.now - began <= 71.0
    assert server.asked == ["probe", "work"]
    said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name.startswith("services.clients")]
    assert [level for level, _ in said] == ["WARNING", "WARNING", "INFO"]
    assert "http://a:1 is left alone" in said[0][1] and "http://a:1 is back after" in said[2][1]
    assert "waiting up to 2" in said[1][1] and "http://a:1 cannot be reached" in said[1][1]


async def test_beyond_the_budget_the_error_is_an_outage(server: Server, clock: SimpleNamespace) -> None:
    client = await probed(clock, server, outage_s=90.0)
    server.is_down = lambda: True
    with pytest.raises(OutageError, match=r"no teacher has answered for 90 s \(teacher_client\.outage_s\)") as raised:
        await score(client)
    assert raised.value.exit_code == 11 and isinstance(raised.value, PeerError)


CHANGES: dict[str, tuple[Spoil, dict[str, Any], str]] = {
    "uniform rows": (uniform, {}, "finds every token equally likely, which it did not"),
    "other weights": (other_weights, {}, r"scores the same tokens differently .* by 0\.3 nats on average"),
    "no numbers": (lambda s: replace(s, token_logprobs=s.token_logprobs * np.float32(np.nan)), {}, "by nan nats"),
    "another model": (same, {"model": "new", "fingerprint": "g" * 16}, r"is another model .*new \(g+\), was scripted"),
    "another tokenizer": (same, {"tokenizer_fingerprint": "u"}, "tokenizer_fingerprint = 'u', was 't'"),
    "a lower limit": (same, {"max_model_len": 32}, "takes less .* max_model_len = 32, was 64"),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_teacher_that_comes_back_changed_is_refused_before_it_scores(
    change: str, server: Server, clock: SimpleNamespace
) -> None:
    spoil, fields, message = CHANGES[change]
    client = await probed(clock, server)
    until = clock.now + 20.0
    server.is_down = lambda: clock.now < until
    server.spoil, server.info = spoil, INFO.model_copy(update=fields)
    with pytest.raises(
        ChangedTeacherError, match=rf"^the teacher at {A} .*{message}.*; start it as it was, then the run"
    ):
        await score(client)
    assert "work" not in server.asked


@pytest.mark.parametrize("change", CHANGES)
async def test_a_changed_replica_is_set_aside_while_another_one_answers(
    change: str, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, fields, message = CHANGES[change]
    changed, good = Server(clock), Server(clock)
    client = await probed(clock, changed, good)
    clock.now += 3.0
    changed.spoil, changed.info = spoil, INFO.model_copy(update=fields)
    for _ in range(4):
        np.testing.assert_allclose(await score(client), expected())
    assert "work" not in changed.asked and good.asked.count("work") == 4
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and warnings[0].startswith(f"{A} is set aside while others answer: ")
    assert re.search(message, warnings[0])
    assert not clock.waits


async def test_a_replica_that_is_itself_again_is_taken_back(clock: SimpleNamespace) -> None:
    changed, good = Server(clock), Server(clock)
    client = await probed(clock, changed, good)
    clock.now += 3.0
    changed.spoil = other_weights
    await score(client)
    changed.spoil = same
    clock.now += 61.0
    for _ in range(3):
        await score(client)
    assert changed.asked.count("work") >= 1


async def test_when_every_replica_has_changed_the_run_ends(clock: SimpleNamespace) -> None:
    servers = [Server(clock), Server(clock)]
    client = await probed(clock, *servers)
    clock.now += 3.0
    for server in servers:
        server.spoil = other_weights
    with pytest.raises(ChangedTeacherError, match="scores the same tokens differently"):
        await score(client)
    assert all("work" not in server.asked for server in servers)


async def test_the_last_unchanged_replica_is_waited_for(clock: SimpleNamespace) -> None:
    changed, away = Server(clock, other_weights), Server(clock)
    changed.spoil = same
    client = await probed(clock, changed, away)
    clock.now += 3.0
    until = clock.now + 45.0
    changed.spoil, away.is_down = other_weights, lambda: clock.now < until
    np.testing.assert_allclose(await score(client), expected())
    assert clock.now >= until and "work" not in changed.asked


@pytest.mark.parametrize("page", [b"<html>maintenance</html>", b""])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_replica_that_answers_with_a_page_is_set_aside_while_another_one_answers(
    method: str, page: bytes, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    paging, good = Server(clock), Server(clock)
    client = await probed(clock, paging, good)
    clock.now += 3.0
    paging.page = lambda request: page if request.method == method else None
    for _ in range(3):
        np.testing.assert_allclose(await score(client), expected())
    assert good.asked.count("work") == 3 and not clock.waits
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith(f"{A} is set aside while others answer: answered with what is not ")
    paging.page = lambda request: None
    clock.now += 61.0
    await score(client)
    assert paging.asked == ["probe", "work"]


async def test_a_page_of_the_only_teacher_is_waited_out_and_then_quoted(server: Server, clock: SimpleNamespace) -> None:
    client = await probed(clock, server, outage_s=90.0)
    began = clock.now
    server.page = lambda request: b"<html>maintenance" if clock.now < began + 60.0 else None
    np.testing.assert_allclose(await score(client), expected())
    server.page = lambda request: b"<html>maintenance"
    clock.now += 3.0
    with pytest.raises(OutageError, match=rf"for 90 s .*: {A} answered with what is not a TeacherInfo: .*b'<html>main"):
        await score(client)


async def test_rows_without_weights_are_probed_at_once_and_not_handed_out(clock: SimpleNamespace) -> None:
    """A server that falls asleep and wakes up breaks no connection."""
    asleep, good = Server(clock), Server(clock)
    client = await probed(clock, asleep, good)
    asleep.spoil = uniform
    for _ in range(2):
        np.testing.assert_allclose(await score(client), expected())
    assert asleep.asked == ["work", "probe"]


async def test_an_answer_that_was_under_way_when_its_teacher_failed_waits_for_the_probe(clock: SimpleNamespace) -> None:
    """One of two requests breaks; the answer to the other one is of nobody knows which process."""
    server = Server(clock)
    client = await probed(clock, server)
    both_asked, broken = asyncio.Event(), asyncio.Event()
    order: list[str] = []

    async def handler(request: httpx.Request) -> httpx.Response:
        work = request.method == "POST" and json.loads(request.content)["sequences"][0]["token_ids"][0] == 50
        if work and not both_asked.is_set():
            first = not order
            order.append("work")
            if first:
                await broken.wait()
                return server(request)
            both_asked.set()
            raise httpx.ReadError("reset")
        if request.method == "POST":
            order.append("probe" if not work else "again")
            if not work:
                broken.set()
        return server(request)

    client._http = httpx.AsyncClient(transport=httpx.MockTransport(handler))
    server.spoil = same
    scores = await client.score(WORK, top_k=4, max_rows_per_request=6)
    assert len(scores.token_logprobs) == len(expected())
    assert order[:3] == ["work", "work", "probe"] and order.count("probe") == 1


async def test_requests_that_wait_for_the_same_probe_share_it(server: Server, clock: SimpleNamespace) -> None:
    client = await probed(clock, server)
    clock.now += 3.0
    await client.score(WORK, top_k=4, max_rows_per_request=1)
    assert server.asked.count("probe") == 1 and server.asked[0] == "probe" and server.asked.count("work") == 6


@pytest.mark.parametrize(("status", "asked"), [(429, ["work"]), (503, ["probe", "work"])])
async def test_a_full_queue_is_no_reason_to_probe_and_a_model_that_is_being_loaded_is(
    status: int, asked: list[str], server: Server, clock: SimpleNamespace
) -> None:
    refusals = [httpx.Response(status, headers={"Retry-After": "1"})]

    def handler(request: httpx.Request) -> httpx.Response:
        is_work = request.method == "POST" and b"[50," in request.content.replace(b" ", b"")
        return refusals.pop() if is_work and refusals else server(request)

    client = TeacherClient([A], transport=httpx.MockTransport(handler), clock=lambda: clock.now)
    await client.keep_probe(PROBE)
    server.asked.clear()
    await score(client)
    assert server.asked == asked and refusals == []


@pytest.mark.parametrize(("swallows", "most_hung"), [("everything", 3), ("scores", 6)])
@pytest.mark.parametrize("is_probed", [True, False])
def test_a_replica_that_hangs_holds_up_few_calls(is_probed: bool, swallows: str, most_hung: int) -> None:
    """The first three requests show it; after those whatever is tried is short, or rare."""

    async def work() -> None:
        is_hung = False

        async def answer(request: httpx.Request) -> httpx.Response:
            await asyncio.sleep(0.5)
            if is_hung and request.url.host == "b" and (swallows == "everything" or request.method == "POST"):
                wait_s = request.extensions["timeout"]["read"]
                await asyncio.sleep(wait_s)
                raise httpx.ReadTimeout("silent", request=request)
            if request.method == "GET":
                return httpx.Response(200, json=INFO.model_dump())
            return httpx.Response(200, content=encode_scores(scores_of(json.loads(request.content))))

        loop = asyncio.get_running_loop()
        client = TeacherClient([A, B], transport=httpx.MockTransport(answer), clock=loop.time)
        if is_probed:
            await client.keep_probe(PROBE)
        is_hung = True
        seconds = []
        for _ in range(200):
            began = loop.time()
            await client.score(WORK, top_k=4)
            seconds.append(loop.time() - began)
            await asyncio.sleep(10.0)
        assert sum(taken > 10 for taken in seconds) <= most_hung
        is_hung = False
        for _ in range(130):
            await client.score(WORK, top_k=4)
            await asyncio.sleep(10.0)
        assert client._replicas.has_untried({A})
        await client.close()

    in_virtual_time(work)


# ------------------------------------------------------------------------------------------ at the start


async def test_rounding_is_no_change(server: Server, clock: SimpleNamespace) -> None:
    client = await probed(clock, server)
    clock.now += 3.0
    server.spoil = rounding
    await score(client)
    assert server.asked == ["probe", "work"]


@pytest.mark.parametrize(
    ("dtype", "noise", "change", "is_same"),
    [
        ("float32", 0.0, 0.0019, True),
        ("float32", 0.0, 0.0025, False),
        ("float32", 0.01, 0.028, True),  # three times what the start shows
        ("float32", 0.01, 0.033, False),
        ("bfloat16", 0.0, 0.048, True),
        ("bfloat16", 0.0, 0.055, False),
        ("bfloat16", 0.09, 0.098, True),
        ("bfloat16", 0.09, 0.105, False),  # the ceiling
        ("unknown", 0.0, 0.048, True),
    ],
)
async def test_what_differs_at_the_start_says_what_may_differ_later(
    dtype: str, noise: float, change: float, is_same: bool, clock: SimpleNamespace
) -> None:
    server = Server(clock, info=INFO.model_copy(update={"dtype": dtype}))

    def shifted(by: float) -> Spoil:
        def spoil(scores: TeacherScores) -> TeacherScores:
            is_alone = len(scores.row_offsets) == 2
            return replace(scores, token_logprobs=scores.token_logprobs - np.float32(noise * is_alone + by))

        return spoil

    server.spoil = shifted(0.0)
    client = await probed(clock, server)
    clock.now += 3.0
    server.spoil = shifted(change)
    if is_same:
        await score(client)
    else:
        with pytest.raises(ChangedTeacherError):
            await score(client)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda n: uniform, "finds every token equally likely: its weights are not loaded"),
        (lambda n: other_weights if n % 2 else same, "answers differently when it is asked twice: .* by 0.3 nats"),
        (
            lambda n: lambda s: replace(s, topk_logprobs=s.topk_logprobs * np.float32(np.nan)),
            "answers with logprobs that are no",
        ),
    ],
)
async def test_a_teacher_that_is_wrong_from_the_start_is_refused(
    second: Callable[[int], Spoil], message: str, server: Server, clock: SimpleNamespace
) -> None:
    server.spoil = lambda scores: second(len(server.asked))(scores)
    with pytest.raises(StartupError, match=rf"^{A} {message}"):
        await probed(clock, server)


def without_an_offset(scores: TeacherScores) -> TeacherScores:
    return replace(scores, row_offsets=scores.row_offsets[:-1])


def without_rows(scores: TeacherScores) -> TeacherScores:
    return replace(scores, **{name: array[:0] for name, array in scores.columns().items()})


@pytest.mark.parametrize("spoil", [without_an_offset, without_rows])
async def test_half_an_answer_to_the_probe_is_refused(spoil: Spoil, server: Server, clock: SimpleNamespace) -> None:
    server.spoil = spoil
    with pytest.raises(PeerError, match=rf"^{A} sent "):
        await probed(clock, server)
    server.spoil = same
    client = await probed(clock, server)
    clock.now += 3.0
    server.spoil = spoil
    with pytest.raises(PeerError, match=rf"^{A} sent "):
        await score(client)


async def test_replicas_must_agree_from_the_start(clock: SimpleNamespace) -> None:
    with pytest.raises(StartupError, match=rf"^{B} does not score as its replica at {A} does: .* by 0\.3 nats"):
        await probed(clock, Server(clock), Server(clock, other_weights))


async def test_what_is_tolerated_can_be_given(server: Server, clock: SimpleNamespace) -> None:
    client = await probed(clock, server)
    await client.keep_probe(PROBE, tolerance=0.5)
    clock.now += 3.0
    server.spoil = other_weights
    await score(client)


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, [32, 32, 32, 32]),
        ({"max_model_len": 5}, [5, 5, 5, 5]),
        ({"max_sequences_per_request": 1}, [32]),
        ({"max_tokens_per_request": 40}, [10, 10, 10, 10]),
        ({"max_tokens_per_request": 5}, [2, 2]),
        ({"max_top_k": 2, "max_model_len": 3}, [3, 3, 3, 3]),
    ],
)
async def test_the_probe_is_what_every_replica_takes_in_one_request(
    limits: dict[str, int], kept: list[int], clock: SimpleNamespace
) -> None:
    tight, wide = Server(clock, info=INFO.model_copy(update=limits)), Server(clock)
    bodies: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            bodies.append(json.loads(request.content))
        return {"a": wide, "b": tight}[request.url.host](request)

    client = TeacherClient([A, B], transport=httpx.MockTransport(handler), clock=lambda: clock.now)
    await client.keep_probe(probe_sequences([list(range(200))]))
    lengths = [[len(s["token_ids"]) for s in body["sequences"]] for body in bodies]
    assert next(found for found in lengths if len(found) == len(kept)) == kept and max(map(len, lengths)) == len(kept)
    assert {body["top_k"] for body in bodies} == {limits.get("max_top_k", 8)}


def test_the_probe_is_pieces_of_the_first_prompts() -> None:
    assert probe_sequences([[1, 2, 3], [4, 5], [6, 7, 8]]) == [([1, 2], 1), ([3, 4], 1), ([5, 6], 1), ([7, 8], 1)]
    assert probe_sequences([[9]]) == [([9, 9], 1)]
    assert [len(ids) for ids, _ in probe_sequences([list(range(1000))])] == [32] * 4


def test_differences_are_the_larger_mean_and_minus_infinity_is_a_number() -> None:
    scores = scores_of({"sequences": [{"token_ids": [1, 2, 3], "prompt_length": 1}], "temperature": 1.0, "top_k": 2})
    lost = replace(scores, token_logprobs=np.full_like(scores.token_logprobs, -np.inf))
    assert difference(lost, lost) == 0.0 and difference(scores, lost) > 30
    wider = replace(scores, topk_logprobs=scores.topk_logprobs - np.float32([[0.5, 0.0]]))
    assert difference(scores, wider) == pytest.approx(0.25)
    assert difference(scores, replace(scores, topk_logprobs=scores.topk_logprobs[:, :1])) == float("inf")
    assert not is_uniform(scores) and is_uniform(uniform(scores))


class Vllm:
    """`vllm serve` under a name; its rows are uniform once it has been put to sleep."""

    def __init__(self) -> None:
        self.name, self.is_asleep = "big", False
        self.paths: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": self.name, "max_model_len": 65}]})
        body = json.loads(request.content)
        asked = [{"token_ids": ids, "prompt_length": 1} for ids in body["prompt"]]
        width = 261 if body["prompt_logprobs"] == -1 else body["prompt_logprobs"]
        scores = scores_of({"sequences": asked, "temperature": 1.0, "top_k": width})
        choices = []
        for index, ids in enumerate(body["prompt"]):
            rows: list[dict[str, Any] | None] = [None]
            for row in range(scores.row_offsets[index], scores.row_offsets[index + 1]):
                found = dict(zip(scores.topk_ids[row].tolist(), scores.topk_logprobs[row].tolist(), strict=True))
                found.setdefault(int(scores.token_ids[row]), float(scores.token_logprobs[row]))
                rows.append({str(i): {"logprob": -5.56 if self.is_asleep else p} for i, p in found.items()})
            assert len(rows) == len(ids)
            choices.append({"index": index, "prompt_logprobs": rows})
        return httpx.Response(200, json={"choices": choices})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda server: setattr(server, "is_asleep", True), "finds every token equally likely, which it did not"),
        (lambda server: setattr(server, "name", "small"), r"is another model .*: small \(.*\), was big \("),
    ],
)
async def test_a_plain_vllm_server_is_probed_as_well(
    change: Callable[[Vllm], None], message: str, clock: SimpleNamespace
) -> None:
    server = Vllm()
    client = VllmTeacherClient([A], transport=httpx.MockTransport(server), clock=lambda: clock.now)
    await client.info()
    await client.keep_probe(PROBE)
    clock.now += 3.0
    await score(client)
    clock.now += 3.0
    change(server)
    with pytest.raises(ChangedTeacherError, match=message):
        await score(client)


async def test_an_answer_says_how_another_one_differs(clock: SimpleNamespace) -> None:
    def answer_of(spoil: Spoil = same, **info: Any) -> Any:
        return probed(clock, Server(clock, spoil=spoil, info=INFO.model_copy(update=info)))

    answers = []
    for client in [
        await answer_of(),
        await answer_of(rounding),
        await answer_of(other_weights),
        await answer_of(fingerprint="g"),
        await answer_of(other_weights, server="vllm", fingerprint="g"),
    ]:
        answers.append(client.probe_answer)
        await client.close()
    first = answers[0]
    assert len(first.logprobs) == sum(len(ids) - length for ids, length in PROBE)
    changed = [str(first.changed(other)).split(":")[0] for other in answers]
    differently = "scores the same tokens differently"
    assert changed == ["None", "None", differently, "is another model", differently]
    assert first.changed(replace(answers[2], question="another one")) is None
