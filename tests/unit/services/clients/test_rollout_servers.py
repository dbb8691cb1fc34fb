"""Several rollout servers of a run: who does the work of one that goes, when it is taken back, and what is never lost."""

import asyncio
import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import httpx
import pytest

from services.clients import rollout, rollout_group
from services.errors import OutageError, PeerError, ProblemError, WeightsWantedError
from services.wire.rollout import decode_completion, encode_completion, encode_stream_error
from tests.unit.services.clients.answers import frame
from tests.unit.services.clients.fleet import LABEL, FakeServer, Fleet, everything, now
from tests.virtual_time import in_virtual_time


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "services.clients")
    return caplog


@pytest.mark.parametrize("is_managed", [True, False])
def test_the_others_do_at_once_what_a_killed_server_has_not_done_and_nothing_twice(
    is_managed: bool, told: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        fleet, arrived = Fleet("a", "b", is_managed=is_managed), Counter[tuple[int, int]]()
        killing = asyncio.create_task(fleet.later(2.5, fleet["b"].kill))
        got = await fleet.generate(10, 2, on_completion=lambda c: arrived.update([(c.prompt_index, c.sample_index)]))
        await killing
        assert got == everything(10, 2) and set(arrived.values()) == {1}
        assert fleet["b"].num_asked == 10 and fleet["a"].num_asked == 18  # its own ten, and eight of b's
        asked_at = fleet["a"].asked[1][0]
        assert asked_at == pytest.approx(3.0, abs=0.1)  # when the stream of b is read on
        assert not set(fleet["b"].asked[0][1][:2]) & set(fleet["a"].asked[1][1])
        await fleet.client.close()

    in_virtual_time(work)
    assert (
        "http://b:1 is away: it cannot be reached: ReadError connection reset; its 8 completions go to the others"
        in told.text
    )


@pytest.mark.parametrize("killed_s", [0.5, 3.5, 5.5, 7.5, 11.5])
def test_a_share_of_several_requests_is_taken_over_wherever_its_server_was(killed_s: float) -> None:
    """Each server takes four completions at once and has twelve to do."""

    async def work() -> None:
        fleet, arrived = Fleet("a", "b"), Counter[tuple[int, int]]()
        fleet.client._limits = dict.fromkeys(fleet.client.urls, 4)
        killing = asyncio.create_task(fleet.later(killed_s, fleet["b"].kill))
        got = await fleet.generate(8, 3, on_completion=lambda c: arrived.update([(c.prompt_index, c.sample_index)]))
        await killing
        assert got == everything(8, 3) and set(arrived.values()) == {1}
        assert max(len(places) for _, places in fleet["a"].asked) <= 4
        assert fleet["a"].num_asked == 12 + 12 - int(killed_s)
        await fleet.client.close()

    in_virtual_time(work)


def test_two_calls_at_once_both_lose_a_server_of_which_one_line_tells(told: pytest.LogCaptureFixture) -> None:
    """An evaluation beside the batch of the next step."""

    async def work() -> None:
        fleet = Fleet("a", "b")
        killing = asyncio.create_task(fleet.later(1.5, fleet["b"].kill))
        assert await asyncio.gather(fleet.generate(6), fleet.generate(10)) == [everything(6), everything(10)]
        await killing
        await fleet.client.close()

    in_virtual_time(work)
    assert told.text.count("http://b:1 is away") == 1


def test_a_connection_that_breaks_for_a_moment_costs_a_server_nothing(told: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        killing = asyncio.create_task(fleet.later(1.5, lambda: setattr(fleet["b"], "life", 1)))
        assert await fleet.generate(8) == everything(8)
        await killing
        assert fleet.client.group.live == ["http://a:1", "http://b:1"]
        fleet["b"].asked.clear()
        assert await fleet.generate(8) == everything(8)
        assert fleet["b"].num_asked >= 3
        await fleet.client.close()

    in_virtual_time(work)
    assert "http://b:1 is back after 0.0 s" in told.text


def test_a_restarted_server_gets_no_prompt_before_a_push_and_its_share_after_it() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        group = fleet.client.group
        killing = asyncio.create_task(fleet.later(1.5, fleet["b"].kill))
        await fleet.generate(8)
        await killing
        fleet["b"].restart()
        fleet["b"].asked.clear()
        await asyncio.sleep(10.0)
        assert group.live == ["http://a:1"] and group.back().keys() == {"http://b:1"}
        await fleet.generate(8)
        assert fleet["b"].asked == []
        await fleet.push("4.1@run", "a", "b")
        assert await fleet.generate(8) == everything(8)
        assert fleet["b"].num_asked == 4
        await fleet.client.close()

    in_virtual_time(work)


def test_a_server_that_holds_older_weights_waits_for_a_push_although_it_is_the_same_process() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        fleet["b"].kill()
        await fleet.generate(2)
        await fleet.push("4.1@run", "a")
        fleet["b"].is_up = True
        await asyncio.sleep(10.0)
        assert fleet.client.group.live == ["http://a:1"] and "http://b:1" in fleet.client.group.back()
        await fleet.client.close()

    in_virtual_time(work)


def test_a_server_that_was_back_too_late_for_a_push_gets_no_prompts_under_its_old_weights() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        await fleet.push("4.1@run", "a")
        assert fleet.client.group.live == ["http://a:1"]
        assert await fleet.generate(4) == everything(4) and fleet["b"].asked == []
        await fleet.client.close()

    in_virtual_time(work)


@pytest.mark.parametrize("label", ["default", "mixed", "3.2@run", "3.1@other"])
def test_what_was_sampled_under_weights_that_are_not_live_is_dropped_and_asked_of_the_others(
    label: str, told: pytest.LogCaptureFixture
) -> None:
    """Its first two completions were of the right ones."""

    async def work() -> None:
        fleet = Fleet("a", "b")
        restarting = asyncio.create_task(fleet.later(2.5, lambda: setattr(fleet["b"], "label", label)))
        seen: list[str] = []
        got = await fleet.generate(10, on_completion=lambda c: seen.append(c.policy_versions[0].policy_version))
        await restarting
        assert got == everything(10) and set(seen) == {LABEL} and fleet["a"].num_asked == 8
        await asyncio.sleep(5.0)
        assert fleet.client.group.live == ["http://a:1"]  # only a push makes it live, whatever it says
        await fleet.client.close()

    in_virtual_time(work)
    assert (
        f"http://b:1 is away: it is not to be trained on: a rollout server sampled under the version '{label}'"
        in told.text
    )


def test_a_server_that_has_forgotten_the_run_is_left_and_one_that_another_run_holds_ends_the_call() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        fleet["b"].refuse = lambda: httpx.Response(409, json={"title": "Not held", "detail": "nobody does"})
        assert await fleet.generate(4) == everything(4)
        assert fleet.client.group.live == ["http://a:1"] and fleet["a"].runs == ["run", "run"]
        await fleet.push("4.1@run", "a", "b")
        fleet["b"].refuse = lambda: httpx.Response(409, json={"title": "Held by another run", "detail": "by r2"})
        with pytest.raises(ProblemError, match="by r2"):
            await fleet.generate(4)
        await fleet.client.close()

    in_virtual_time(work)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy_lives_and_rests(status: int) -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        busy = [httpx.Response(status, headers={"Retry-After": "20"})]
        fleet["b"].refuse = lambda: busy.pop() if busy else None
        assert await fleet.generate(4) == everything(4)
        assert fleet["b"].num_asked == 4 and 20.0 <= fleet["b"].asked[1][0] <= 26.0 and fleet["a"].num_asked == 2
        await fleet.client.close()

    in_virtual_time(work)


@pytest.mark.parametrize(("lasts_s", "num_elsewhere"), [(0.5, 0), (60.0, 2)])
def test_an_error_of_a_server_may_pass_for_two_seconds(lasts_s: float, num_elsewhere: int) -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        fleet["b"].refuse = lambda: httpx.Response(500) if now() < lasts_s else None
        assert await fleet.generate(4) == everything(4)
        assert fleet["a"].num_asked == 2 + num_elsewhere and now() < 8.0
        await fleet.client.close()

    in_virtual_time(work)


def test_a_stopped_server_is_left_after_two_and_a_half_signs_of_life_where_there_are_others() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        stopping = asyncio.create_task(fleet.later(1.5, lambda: setattr(fleet["b"], "is_silent", True)))
        assert await fleet.generate(8) == everything(8)
        await stopping
        assert fleet["a"].asked[1][0] == pytest.approx(27.0, abs=0.1)
        fleet["b"].is_silent = False
        await asyncio.sleep(10.0)
        assert "http://b:1" in fleet.client.group.live
        await fleet.client.close()

    in_virtual_time(work)
    assert rollout._SILENCE_S == 25.0


def test_a_lone_server_is_waited_for_as_long_as_its_option_says() -> None:
    async def work() -> None:
        fleet = Fleet("a", timeout_s=40.0)
        fleet["a"].is_silent = True
        asking = asyncio.create_task(fleet.generate(1))
        await asyncio.sleep(39.0)
        assert fleet.client.group.live == ["http://a:1"]
        await asyncio.sleep(2.0)
        assert fleet.client.group.live == []
        fleet["a"].is_silent = False
        assert await asking == everything(1)
        await fleet.client.close()

    in_virtual_time(work)


@pytest.mark.parametrize("hosts", ["a", "ab"])
def test_where_all_were_started_again_their_weights_are_asked_for_and_then_the_rest_is_completed(hosts: str) -> None:
    async def work() -> None:
        fleet = Fleet(*hosts)
        asking = asyncio.create_task(fleet.generate(6, waits_for_weights=True))
        await asyncio.sleep(1.5)
        for host in hosts:
            fleet[host].kill()
        await asyncio.sleep(20.0)
        assert not fleet.client.group.weights_wanted.is_set()
        for host in hosts:
            fleet[host].restart()
        async with asyncio.timeout(3.0):
            await fleet.client.group.weights_wanted.wait()
        assert not asking.done() and fleet["a"].num_asked == 6 // len(hosts)
        await asyncio.sleep(3.0)
        await fleet.push("3.2@run", *hosts)
        assert await asking == everything(6) and not fleet.client.group.weights_wanted.is_set()
        assert sum(fleet[host].num_asked for host in hosts) == 6 + 6 - len(hosts)  # each had completed one
        await fleet.client.close()

    in_virtual_time(work)


def test_who_does_not_wait_for_weights_hears_that_they_are_wanted() -> None:
    """An evaluation: it is the one who would have to push."""

    async def work() -> None:
        fleet = Fleet("a")
        fleet["a"].restart()
        with pytest.raises(WeightsWantedError, match="http://a:1 answers again, but holds no weights of this run"):
            await fleet.generate(2)
        assert not fleet.client.group.weights_wanted.is_set()
        await fleet.client.close()

    in_virtual_time(work)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (
            "a",
            r"^the rollout server has not answered for 60 s \(rollout_client.outage_s\): http://a:1 cannot be reached: ConnectError "
            r"refused \(for 6\d s\); start it again and run the same command again, which resumes the run; to wait longer, raise",
        ),
        (
            "ab",
            r"^no rollout server has answered for 60 s \(rollout_client.outage_s\): http://a:1 cannot .* \(for 6\d s\); "
            r"http://b:1 cannot .* \(for 6\d s\); start them again",
        ),
    ],
)
def test_an_outage_beyond_the_budget_is_an_error_of_its_own(
    hosts: str, message: str, told: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        fleet = Fleet(*hosts)
        for host in hosts:
            fleet[host].kill()
        with pytest.raises(OutageError, match=message) as caught:
            await fleet.generate(4)
        assert caught.value.exit_code == 11 and 60.0 <= now() < 63.0
        await fleet.client.close()

    in_virtual_time(work)
    assert len(told.records) == len(hosts)  # nothing is repeated while they are waited for


def is_not_well(server: FakeServer, how: str) -> None:
    """It says all the same that it is."""
    answer = server.answer

    async def swallow(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/rollouts":
            server.asked.append((now(), []))
            await asyncio.sleep(request.extensions["timeout"]["read"])
            raise httpx.ReadTimeout("silent", request=request)
        return await answer(request)

    if how == "answered no request":
        server.answer = swallow  # type: ignore[method-assign]
    else:
        headers = {"Retry-After": "5"} if "503" in how else {}
        server.refuse = lambda: httpx.Response(int(how.split()[-1]), headers=headers)


@pytest.mark.parametrize("hosts", ["a", "ab"])
@pytest.mark.parametrize(
    ("how", "said", "within_s"),
    [
        ("answered 500", "answered 500", 80.0),
        ("answered 503", "answered 503", 200.0),
        ("answered no request", "is connected but slow: no answer within", 210.0),
    ],
)
def test_servers_that_say_they_are_well_and_never_complete_anything_are_given_up(
    how: str, said: str, within_s: float, hosts: str
) -> None:
    async def work() -> None:
        fleet = Fleet(*hosts, timeout_s=100.0)
        for host in hosts:
            is_not_well(fleet[host], how)
        with pytest.raises(OutageError, match=f"http://a:1 {said}"):
            async with asyncio.timeout(1000.0):
                await fleet.generate(4, waits_for_weights=True)
        assert 60.0 <= now() < within_s and len(fleet["a"].asked) < 120
        await fleet.client.close()

    in_virtual_time(work)


@pytest.mark.parametrize("how", ["answered 503", "answered no request"])
def test_one_of_several_that_never_completes_anything_costs_25_seconds_more_and_more_rarely(how: str) -> None:
    async def work() -> None:
        fleet = Fleet("a", "b", "c", timeout_s=300.0, outage_s=300.0)
        is_not_well(fleet["b"], how)
        seconds = []
        for _ in range(40):
            began = now()
            assert await fleet.generate(12, waits_for_weights=True) == everything(12)
            seconds.append(now() - began)
        assert max(seconds) < 36.0 and sum(took > 20.0 for took in seconds) <= 10
        fleet["b"].refuse, fleet["b"].answer = lambda: None, FakeServer.answer.__get__(fleet["b"])  # type: ignore[method-assign]
        await asyncio.sleep(65.0)
        assert fleet.client.group.live == ["http://a:1", "http://b:1", "http://c:1"]
        await fleet.client.close()

    in_virtual_time(work)


def refusing(status: int) -> httpx.Response:
    return httpx.Response(status, json={"detail": "no"}, headers={"Location": "/x"} if status < 400 else {})


@pytest.mark.parametrize("status", [307, 401, 403, 404, 405])
def test_one_that_refuses_whoever_asks_is_left_until_a_push(status: int) -> None:
    """It was started again with another key, or another program has its address."""

    async def work() -> None:
        fleet = Fleet("a", "b")
        fleet["b"].refuse = lambda: refusing(status)
        assert await fleet.generate(4) == everything(4)
        await asyncio.sleep(10.0)
        assert fleet.client.group.live == ["http://a:1"] and len(fleet["b"].asked) == 1
        fleet["b"].refuse = lambda: None
        await fleet.push("4.1@run", "a", "b")
        assert await fleet.generate(4) == everything(4) and fleet["b"].num_asked > 2
        await fleet.client.close()

    in_virtual_time(work)


def test_a_lone_one_that_refuses_whoever_asks_is_waited_for() -> None:
    async def work() -> None:
        fleet = Fleet("a")
        answer = fleet["a"].answer

        async def refuse(request: httpx.Request) -> httpx.Response:
            await answer(request)
            return refusing(401)

        fleet["a"].answer = refuse  # type: ignore[method-assign]
        with pytest.raises(OutageError, match=r"http://a:1 .*answered 401: no"):
            await fleet.generate(4, waits_for_weights=True)
        assert 60.0 <= now() < 65.0
        await fleet.client.close()

    in_virtual_time(work)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_for_what_it_says_ends_the_call(status: int) -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        fleet["b"].refuse = lambda: refusing(status)
        with pytest.raises(ProblemError, match=f"answered {status}: no"):
            await fleet.generate(4)
        await fleet.client.close()

    in_virtual_time(work)


def test_an_answer_from_before_a_push_does_not_take_a_server_away_that_the_push_took_in() -> None:
    async def work() -> None:
        fleet = Fleet("a")
        group, url, is_on_its_way = fleet.client.group, fleet["a"].url, asyncio.Event()
        ask, pushed = group._ask, asyncio.Event()

        async def slow(url: str) -> Any:
            info = await ask(url)
            is_on_its_way.set()
            await pushed.wait()
            return info

        group._ask = slow
        group.leave(url, "was slow")
        await is_on_its_way.wait()
        await fleet.push("4.1@run", "a")
        pushed.set()
        await asyncio.sleep(0.1)
        assert group.live == [url]
        await fleet.client.close()

    in_virtual_time(work)


def test_a_server_that_wants_weights_again_and_again_is_given_up() -> None:
    async def work() -> None:
        fleet = Fleet("a")
        asking = asyncio.create_task(fleet.generate(4, waits_for_weights=True))
        fleet["a"].label = "mixed"
        with pytest.raises(OutageError, match="http://a:1 is not to be trained on"):
            while not asking.done():
                if fleet.client.group.weights_wanted.is_set():
                    await fleet.push("3.2@run", "a")
                    fleet["a"].label = "mixed"
                await asyncio.sleep(0.5)
            await asking
        assert 60.0 <= now() < 80.0
        await fleet.client.close()

    in_virtual_time(work)


@pytest.mark.parametrize("content", [b"garbage!", frame(9, 9, 1), encode_stream_error("no such expert")[4:]])
def test_a_completion_that_cannot_be_read_costs_itself_alone_and_is_asked_again_elsewhere(content: bytes) -> None:
    def spoiled(good: bytes, token: int, times: int) -> bytes:
        return good if token != 13 else len(content).to_bytes(4, "little") + content

    async def work() -> None:
        fleet = Fleet("a", "b")
        fleet["b"].spoil = spoiled
        assert await fleet.generate(6) == everything(6)
        assert [places for _, places in fleet["a"].asked[1:]] == [[(13, 7)]] and fleet["b"].num_asked == 3
        assert fleet.client.group.live == ["http://a:1", "http://b:1"]
        await fleet.client.close()

    in_virtual_time(work)


@pytest.mark.parametrize(("hosts", "num_tries"), [("a", 2), ("ab", 2), ("abcd", 3)])
def test_one_that_every_server_spoils_alike_ends_the_call_with_the_reason(hosts: str, num_tries: int) -> None:
    async def work() -> None:
        fleet = Fleet(*hosts)
        for host in hosts:
            fleet[host].spoil = lambda good, token, times: good if token != 13 else b"\x08\0\0\0garbage!"
        with pytest.raises(PeerError, match=r"http://\w:1: "):
            await fleet.generate(6)
        assert sum((13, 7) in places for host in hosts for _, places in fleet[host].asked) == num_tries
        await fleet.client.close()

    in_virtual_time(work)


def test_a_lone_server_may_spoil_one_once() -> None:
    async def work() -> None:
        fleet = Fleet("a")
        fleet["a"].spoil = lambda good, token, times: good if token != 13 or times > 1 else b"\x08\0\0\0garbage!"
        assert await fleet.generate(6) == everything(6)
        assert [places for _, places in fleet["a"].asked[1:]] == [[(13, 7)]]
        await fleet.client.close()

    in_virtual_time(work)


def test_a_server_whose_engine_has_died_is_away_although_it_still_answers() -> None:
    """It says so within its answer, and is not ready any more."""

    async def work() -> None:
        fleet = Fleet("a", "b")

        def dies(good: bytes, token: int, times: int) -> bytes:
            fleet["b"].is_up = False
            return encode_stream_error("EngineDeadError: see the log")

        fleet["b"].spoil = dies
        assert await fleet.generate(6) == everything(6)
        assert fleet.client.group.live == ["http://a:1"]
        await fleet.client.close()

    in_virtual_time(work)


def given_up(content: bytes) -> bytes:
    return encode_completion(replace(decode_completion(content[4:]), finish_reason="abort"))


@pytest.mark.parametrize("hosts", ["a", "ab"])
@pytest.mark.parametrize(("is_always", "reason"), [(True, "abort"), (False, "stop")])
def test_what_a_server_gives_up_is_asked_again_once(hosts: str, is_always: bool, reason: str) -> None:
    async def work() -> None:
        fleet, reasons = Fleet(*hosts), dict[int, str]()
        asked: Counter[int] = Counter()

        def spoil(good: bytes, token: int, times: int) -> bytes:
            asked[token] += 1
            return given_up(good) if token == 13 and (is_always or asked[token] == 1) else good

        for host in hosts:
            fleet[host].spoil = spoil
        await fleet.generate(6, on_completion=lambda c: reasons.update({c.prompt_index: c.finish_reason}))
        assert [reasons[index] for index in range(6)] == [*["stop"] * 3, reason, *["stop"] * 2]
        assert asked == {10: 1, 11: 1, 12: 1, 13: 2, 14: 1, 15: 1}
        await fleet.client.close()

    in_virtual_time(work)


@pytest.mark.parametrize(("pace", "share"), [(1.0, 0.5), (0.25, 0.8), (4.0, 0.2)])
def test_prompts_follow_the_speed_of_the_servers(pace: float, share: float) -> None:
    """`a` needs `pace` seconds for a completion, `b` one."""

    async def work() -> None:
        fleet = Fleet("a", "b")
        fleet["a"].completion_s = pace
        for _ in range(12):
            fleet["a"].asked.clear()
            started = now()
            assert await fleet.generate(40) == everything(40)
        assert fleet["a"].num_asked == pytest.approx(40 * share, abs=2)
        assert now() - started <= 1.1 * 40 / (1 + 1 / pace)
        await fleet.client.close()

    in_virtual_time(work)


def test_a_server_that_was_slow_once_is_measured_again() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        fleet["b"].completion_s = 100.0
        for _ in range(6):
            await fleet.generate(40)
        fleet["b"].completion_s, fleet["b"].asked = 1.0, []
        await fleet.generate(40)
        assert fleet["b"].num_asked in (3, 4)  # a tenth of what the fastest gets
        for _ in range(12):
            fleet["b"].asked.clear()
            await fleet.generate(40)
        assert fleet["b"].num_asked >= 18
        await fleet.client.close()

    in_virtual_time(work)


def test_a_server_that_leaves_and_returns_all_the_time_is_told_of_a_few_times(told: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        fleet["b"].refuse = lambda: httpx.Response(500)
        for _ in range(20):
            await fleet.generate(4)
        await fleet.client.close()

    in_virtual_time(work)
    assert told.text.count("http://b:1 is away") == 1 + rollout_group._RELAPSES_TOLD


def test_nothing_is_watched_after_the_close() -> None:
    async def work() -> Any:
        fleet = Fleet("a", "b")
        fleet["b"].kill()
        await fleet.generate(4)
        await fleet.client.close()
        fleet.client.group.leave("http://a:1", "is gone")
        await asyncio.sleep(0)
        return [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert in_virtual_time(work) == []
