"""A rollout server that is away for a while: how long it is waited for, and that only what is missing is asked again."""

import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from services.clients import RolloutClient
from services.errors import PeerError, ProblemError
from services.wire.policy_label import PolicyLabel
from services.wire.rollout import RolloutCompletion, RolloutSampling
from tests.unit.services.clients.answers import completed, frame, frames_for
from trainer.weights.policy_versions import PolicyVersions

A, B = "http://a:1", "http://b:2"
SAMPLING = RolloutSampling(max_new_tokens=4, seed=7)


def client(
    handler: Callable[[httpx.Request], Any], clock: SimpleNamespace, *urls: str, **options: Any
) -> RolloutClient:
    transport = httpx.MockTransport(handler)
    return RolloutClient(list(urls or (A,)), transport=transport, clock=lambda: clock.now, **options)


class BreakingStream(httpx.AsyncByteStream):
    """Some frames, and then the connection is gone."""

    def __init__(self, frames: list[bytes], error: Exception) -> None:
        self.frames, self.error = frames, error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for content in self.frames:
            yield content
        raise self.error


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), 500, 502, 503, 429, 408])
async def test_a_server_that_restarts_is_waited_for(failure: int | Exception, clock: SimpleNamespace) -> None:
    def down_for_200_s(request: httpx.Request) -> httpx.Response:
        if clock.now < 300.0:
            if isinstance(failure, Exception):
                raise failure
            return httpx.Response(failure)
        return completed(request)

    got = await client(down_for_200_s, clock).generate([[10], [11]], SAMPLING)
    assert [c.token_ids.tolist() for c in got] == [[10, 7], [11, 7]]
    assert 300 <= clock.now < 310
    lowest = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, *[10.0] * 100]
    for low, wait in zip(lowest, clock.waits, strict=False):
        assert low <= wait <= min(10.0, low + 1.0)


async def test_retry_after_is_waited_for(clock: SimpleNamespace) -> None:
    answers = [httpx.Response(429, headers={"Retry-After": "40"}), None]
    got = await client(lambda request: answers.pop(0) or completed(request), clock).generate([[10]], SAMPLING)
    assert len(got) == 1 and len(clock.waits) == 1 and 40 <= clock.waits[0] <= 50


@pytest.mark.parametrize(
    ("options", "seconds"), [({}, 300), ({"outage_s": 60.0}, 60), ({"outage_s": 60.0, "attempts": 1}, 60)]
)
async def test_an_outage_that_lasts_names_the_server_the_time_the_reason_and_the_option(
    options: dict[str, Any], seconds: int, clock: SimpleNamespace
) -> None:
    asked_at: list[float] = []

    def down(request: httpx.Request) -> httpx.Response:
        asked_at.append(clock.now)
        raise httpx.ConnectError("refused")

    message = (
        rf"^a rollout server has not answered for {seconds} s \(rollout_client.outage_s\): http://b:2 cannot be reached: "
        r"ConnectError refused; to wait longer, raise rollout_client.outage_s \(of a client in Python: outage_s\)$"
    )
    with pytest.raises(PeerError, match=message):
        await client(down, clock, B, **options).generate([[10], [11]], SAMPLING)
    assert asked_at[0] == 100.0 and asked_at[-1] == pytest.approx(100.0 + seconds)  # a last time at the end


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422])
async def test_what_is_refused_is_not_waited_for(status: int, clock: SimpleNamespace) -> None:
    """409: the server is another run's, or was started again and is nobody's."""
    asked: list[httpx.Request] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(status, json={"detail": "no"})

    with pytest.raises(ProblemError, match=f"answered {status}: no"):
        await client(refuse, clock).generate([[10]], SAMPLING)
    assert len(asked) == 1 and clock.waits == []


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("num_received", range(1, 6))
async def test_only_what_had_not_arrived_is_asked_again(num_received: int, order: int, clock: SimpleNamespace) -> None:
    """Of 3 prompts x 2 samples, sent from the last to the first, or the other way round."""
    asked: list[list[tuple[int, int]]] = []

    def breaks_once(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seeds = [body["sampling"]["seed"] + sample for sample in range(body["samples_per_prompt"])]
        asked.append([(prompt[0], seed) for prompt in body["prompts"] for seed in seeds])
        if len(asked) == 1:
            arrive = frames_for(request)[::-order][:num_received]
            return httpx.Response(200, stream=BreakingStream(arrive, httpx.RemoteProtocolError("gone")))
        return completed(request)

    got = await client(breaks_once, clock).generate([[10], [11], [12]], SAMPLING, samples_per_prompt=2)
    everything = [(10 + prompt, 7 + sample) for prompt in range(3) for sample in range(2)]
    assert asked[0] == everything
    assert sorted(pair for request in asked[1:] for pair in request) == sorted(everything[::order][num_received:])
    assert [(c.prompt_index, c.sample_index, *c.token_ids.tolist()) for c in got] == [
        (prompt - 10, seed - 7, prompt, seed) for prompt, seed in everything
    ]
    assert clock.waits == []  # it did answer


async def test_a_server_that_breaks_off_again_and_again_is_asked_as_long_as_something_arrives(
    clock: SimpleNamespace,
) -> None:
    num_asked = 0

    def one_at_a_time(request: httpx.Request) -> httpx.Response:
        nonlocal num_asked
        num_asked += 1
        clock.now += 100.0
        return httpx.Response(200, stream=BreakingStream(frames_for(request)[:1], httpx.ReadError("gone")))

    got = await client(one_at_a_time, clock, outage_s=1.0).generate([[10 + i] for i in range(5)], SAMPLING)
    assert [c.token_ids[0] for c in got] == [10, 11, 12, 13, 14] and num_asked == 5


async def test_a_server_that_breaks_off_before_anything_arrives_is_waited_for_and_given_up(
    clock: SimpleNamespace,
) -> None:
    def nothing(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=BreakingStream([], httpx.ReadError("gone")))

    with pytest.raises(PeerError, match=r"has not answered for 20 s .*http://a:1 cannot be reached: ReadError gone"):
        await client(nothing, clock, outage_s=20.0).generate([[10]], SAMPLING)
    assert clock.now == pytest.approx(120.0)


async def test_each_completion_is_told_once_when_it_arrives_also_where_answers_break_off(
    clock: SimpleNamespace,
) -> None:
    """By its place in the call, not in the request that brought it."""
    told: list[tuple[int, int]] = []
    num_told: list[int] = []

    def one_at_a_time(request: httpx.Request) -> httpx.Response:
        num_told.append(len(told))
        return httpx.Response(200, stream=BreakingStream(frames_for(request)[:1], httpx.ReadError("gone")))

    prompts = [[10 + i] for i in range(4)]
    await client(one_at_a_time, clock).generate(
        prompts, SAMPLING, on_completion=lambda c: told.append((c.prompt_index, int(c.token_ids[0])))
    )
    assert sorted(told) == [(0, 10), (1, 11), (2, 12), (3, 13)] and num_told == [0, 1, 2, 3]


async def test_what_the_listener_raises_ends_the_call(clock: SimpleNamespace) -> None:
    asked = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return completed(request)

    def refuse(completion: RolloutCompletion) -> None:
        raise PeerError("of another run")

    with pytest.raises(PeerError, match="of another run"):
        await client(handler, clock).generate([[10], [11]], SAMPLING, on_completion=refuse)
    assert len(asked) == 1


@pytest.mark.parametrize("wrong", ["doubled", "invented"])
async def test_wrong_completions_before_a_break_are_refused(wrong: str, clock: SimpleNamespace) -> None:
    def breaks(request: httpx.Request) -> httpx.Response:
        first = frames_for(request)[0]
        other = first if wrong == "doubled" else frame(9, 0, 1)
        return httpx.Response(200, stream=BreakingStream([first, other], httpx.ReadError("gone")))

    with pytest.raises(PeerError, match=r"sent sample 0 of prompt \d twice, or unasked"):
        await client(breaks, clock).generate([[10], [11], [12]], SAMPLING)


async def test_too_large_after_a_break_cuts_what_is_missing_alone(clock: SimpleNamespace) -> None:
    """A server that was replaced by one that takes less at once."""
    asked: list[list[int]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        prompts = [prompt[0] for prompt in json.loads(request.content)["prompts"]]
        asked.append(prompts)
        if len(asked) == 1:
            return httpx.Response(200, stream=BreakingStream(frames_for(request)[:1], httpx.ReadError("gone")))
        return completed(request) if len(prompts) == 1 else httpx.Response(413)

    got = await client(handler, clock).generate([[10], [11], [12]], SAMPLING)
    assert [c.token_ids[0] for c in got] == [10, 11, 12]
    assert asked == [[10, 11, 12], [10, 11], [10], [11]]


async def test_a_server_that_was_started_again_is_seen_in_what_it_sampled(clock: SimpleNamespace) -> None:
    """It has the weights it was started with: what it samples must not pass for the run's newest version."""
    versions = PolicyVersions("run")
    label = PolicyLabel(3, 1, "run")
    versions.set_live(label)

    def restarts(request: httpx.Request) -> httpx.Response:
        if clock.now < 150:
            if clock.now > 100:
                raise httpx.ConnectError("refused")
            clock.now += 1
            return httpx.Response(
                200,
                stream=BreakingStream(frames_for(request, str(label))[:1], httpx.ReadError("gone")),
            )
        return completed(request)

    got = await client(restarts, clock).generate([[10], [11]], SAMPLING)
    assert [[span.policy_version for span in c.policy_versions] for c in got] == [["default"], [str(label)]]
    assert versions.of(got[1]) == [3]
    with pytest.raises(PeerError, match=r"sampled under the version 'default', .* it was started again"):
        versions.of(got[0])
