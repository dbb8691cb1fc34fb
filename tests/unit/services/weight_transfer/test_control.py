"""The control of several servers by one run: ranks, the lease, all-or-nothing, errors that name server and stage."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from services.errors import ServerHeldError, ServerRestartedError, StartupError, WeightSyncError
from services.weight_transfer import control as control_module
from services.weight_transfer.control import WeightControlClient
from services.wire.weights import HoldRequest
from tests.unit.services.weight_transfer import controls

URLS = ["http://c", "http://a", "http://b"]
Answer = httpx.Response | Exception


class Servers:
    """Answer `{}`, a hold with a boot id, or what `answers` says for "host/stage" ("host/ready"): one, or one after the other."""

    def __init__(self, answers: dict[str, Answer | list[Answer]] | None = None) -> None:
        self.answers = answers or {}
        self.calls: list[tuple[str, str, Any]] = []
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        host, stage = request.url.host, request.url.path.removeprefix("/v1/weights/").removeprefix("/")
        self.calls.append((host, stage, json.loads(request.content or "null")))
        self.requests.append(request)
        usual = httpx.Response(200, json={"boot_id": f"of {host}"} if stage == "hold" else {})
        answer = self.answers.get(f"{host}/{stage}", usual)
        if isinstance(answer, list):
            answer = answer.pop(0) if answer else usual
        if isinstance(answer, Exception):
            raise answer
        return answer

    def bodies(self, stage: str) -> dict[str, Any]:
        return {host: body for host, called, body in self.calls if called == stage}

    def stages(self) -> list[tuple[str, str]]:
        return [(host, stage) for host, stage, _ in self.calls]


def control(answer: Any, urls: list[str] = URLS, **options: Any) -> WeightControlClient:
    return controls.control(answer, urls, **options)


def problem(status: int, detail: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"detail": detail}, headers=headers)


async def test_each_server_joins_behind_the_ranks_of_those_before_it_with_the_deadline_of_a_stage() -> None:
    servers = Servers()
    await control(servers).connect({"master_port": 1, "rank_offset": 1})
    bodies = servers.bodies("connect")
    assert {host: body["rendezvous"] for host, body in bodies.items()} == {
        "c": {"master_port": 1, "rank_offset": 1},
        "a": {"master_port": 1, "rank_offset": 3},
        "b": {"master_port": 1, "rank_offset": 4},
    }
    assert {body["timeout_s"] for body in bodies.values()} == {5.0}


async def test_every_call_names_its_run_and_carries_the_key() -> None:
    servers = Servers()
    client = control(servers)
    stages: list[Callable[[], Awaitable[Any]]] = [
        client.hold,
        lambda: client.connect({}),
        lambda: client.pause(3.0),
        client.start,
        lambda: client.finish("1.1@r1"),
        client.resume,
        client.release,
    ]
    for stage in stages:
        await stage()
    assert len(servers.calls) == 3 * len(stages)
    assert {body["run"] for *_, body in servers.calls} == {"r1"}
    assert {request.headers["authorization"] for request in servers.requests} == {"Bearer k"}


async def test_a_server_may_take_as_long_as_a_stage_and_to_drain_longer() -> None:
    servers = Servers()
    client = control(servers)
    await client.start()
    await client.pause(60.0)
    start, pause = (request.extensions["timeout"]["read"] for request in (servers.requests[0], servers.requests[-1]))
    assert 5.0 < start < 60.0 and pause == start + 60.0


async def test_reports_come_in_the_order_of_the_servers_whoever_answers_first() -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep({"c": 0.04, "a": 0.02, "b": 0.0}[request.url.host])
        host = request.url.host
        return httpx.Response(200, json={"workers": [{"of": host}] * {"c": 2, "a": 1, "b": 4}[host]})

    assert await control(answer).receive({}) == [[{"of": "c"}] * 2, [{"of": "a"}], [{"of": "b"}] * 4]


async def test_all_servers_are_asked_at_once() -> None:
    together = asyncio.Barrier(3)  # passed by nobody unless all three calls are under way

    async def answer(_: httpx.Request) -> httpx.Response:
        await asyncio.wait_for(together.wait(), 10.0)
        return httpx.Response(200, json={})

    await control(answer).start()


async def test_the_server_that_fails_first_is_named_and_the_others_are_not_waited_for() -> None:
    never = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host != "b":
            await never.wait()
        return problem(500, "receive failed in worker 1: RuntimeError: lost")

    with pytest.raises(
        WeightSyncError, match=r"receive on http://b answered 500 after \d+\.\d s: .* worker 1: Runtime"
    ):
        await asyncio.wait_for(control(answer).receive({}), 5.0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            httpx.ReadTimeout("slow"),
            r"start on http://a failed after .*it is connected but slow: .*weight_sync\.stage_timeout_s",
        ),
        (httpx.ConnectError("gone"), "start on http://a failed after .*it cannot be reached: ConnectError gone"),
        (problem(500, "no room"), "start on http://a answered 500 after .*: no room$"),
        (httpx.Response(502, text="<html>"), "<html>"),
        (httpx.Response(502, json=["<html>"]), "<html>"),
        (problem(401, "a key"), "a key; give its key in DISTILLSERVE_ROLLOUT_KEY"),
        (problem(404, "none"), "none; it is not a distillserve rollout server of this version"),
        (httpx.Response(200, text="<html>"), "start on http://a: the answer is no JSON object"),
        (httpx.Response(200, json=[]), "start on http://a: the answer is no JSON object"),
    ],
)
async def test_what_went_wrong_is_said_with_server_and_stage(answer: Answer, said: str) -> None:
    with pytest.raises(WeightSyncError, match=said):
        await control(Servers({"a/start": answer})).start()


async def test_servers_are_taken_in_one_order_whatever_they_are_called() -> None:
    servers = Servers()
    await control(servers, boot_ids=["of c", "of a", "of b"]).hold()
    assert servers.stages() == [("a", "hold"), ("b", "hold"), ("c", "hold")]
    assert servers.bodies("hold")["a"] == {"run": "r1", "name": "a test", "lease_s": 30.0, "take_over": False}


async def test_one_server_under_two_names_is_refused() -> None:
    with pytest.raises(StartupError, match=r"rollout_client.urls = .* lead to one server twice"):
        control(Servers(), boot_ids=["x", "y", "x"])


async def test_a_name_is_cut_to_what_a_server_takes() -> None:
    servers = Servers()
    await control(servers, name="n" * 1000).hold()
    HoldRequest.model_validate(servers.bodies("hold")["a"])


async def test_a_server_whose_holder_is_silent_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, told = [], []
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: (waits.append(seconds), sleep(0))[1])
    servers = Servers({"b/hold": [problem(409, "held by the run r0", **{"Retry-After": "12"})]})
    await control(servers).hold(on_wait=lambda url, seconds: told.append((url, seconds)))
    assert servers.stages() == [("a", "hold"), ("b", "hold"), ("b", "hold"), ("c", "hold")]
    assert waits[0] == 13.0 and told == [("http://b", 12.0)]


async def test_a_server_whose_holder_lives_is_refused_and_the_others_are_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))
    servers = Servers({"b/hold": problem(409, "held by the run r0 (somebody)")})
    with pytest.raises(ServerHeldError, match=r"hold on http://b: held by the run r0 \(somebody\)"):
        await control(servers).hold()
    assert servers.stages() == [("a", "hold"), ("b", "hold"), ("b", "hold"), ("a", "release")]


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_lease_is_renewed_until_it_is_lost_and_then_nothing_more_is_asked() -> None:
    lost = problem(409, "held by the run r2, which took it from the run r1")
    fine = httpx.Response(200, json={"boot_id": "of a"})
    servers = Servers({"a/hold": [fine, fine, httpx.ConnectError("for a moment"), lost]})
    client = control(servers, ["http://a"], lease_s=0.12)
    await client.hold()
    await soon(lambda: client._lease.lost is not None)
    assert servers.stages()[:4] == [("a", "hold")] * 4
    with pytest.raises(ServerHeldError, match="held by the run r2, which took it"):
        await client.start()
    assert ("a", "start") not in servers.stages()
    await client.close()


async def test_a_lease_is_renewed_while_the_trainer_is_busy() -> None:
    servers = Servers()
    client = control(servers, ["http://a"], lease_s=0.12)
    await client.hold()
    time.sleep(0.3)  # nothing of the event loop runs
    assert len(servers.calls) > 3
    await client.release()
    await asyncio.sleep(0.1)
    number = servers.stages().count(("a", "hold"))
    await asyncio.sleep(0.2)
    assert servers.stages().count(("a", "hold")) == number
    await client.close()


async def test_a_renewal_that_is_under_way_has_ended_before_a_server_is_given_back() -> None:
    order: list[str] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        stage = request.url.path.rpartition("/")[2]
        if stage == "hold" and "hold begun" in order:
            order.append("renewal begun")
            await asyncio.sleep(0.2)
            order.append("renewed")
        order.append(f"{stage} begun")
        return httpx.Response(200, json={"boot_id": "of a"})

    client = control(answer, ["http://a"], lease_s=3.0)
    await client.hold()
    await soon(lambda: "renewal begun" in order)
    await client.release()
    assert order.index("release begun") > max(i for i, event in enumerate(order) if event == "renewed")
    await client.close()


async def test_a_server_that_may_have_been_given_while_the_run_was_ended_is_given_back() -> None:
    asked: list[str] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path.rpartition("/")[2])
        if asked[-1] == "hold":
            await asyncio.sleep(3600)
        return httpx.Response(200, json={})

    client = control(answer, ["http://a"])
    holding = asyncio.create_task(client.hold())
    await soon(lambda: asked == ["hold"])
    holding.cancel()
    await asyncio.wait([holding])
    await client.release()
    assert asked == ["hold", "release"]
    await client.close()


async def test_a_server_that_stalls_does_not_cost_the_others_their_lease() -> None:
    renewed: list[str] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        host = request.url.host
        renewed.append(host)
        if host == "a" and renewed.count("a") > 1:
            await asyncio.sleep(3600)
        return httpx.Response(200, json={"boot_id": f"of {host}"})

    client = control(answer, ["http://a", "http://b"], lease_s=0.18)
    await client.hold()
    await soon(lambda: renewed.count("b") > 4)
    assert client._lease.lost is None
    client._lease.close()


async def test_what_was_taken_first_is_renewed_while_the_rest_is_waited_for() -> None:
    servers = Servers({"b/hold": [problem(409, "held by the run r0", **{"Retry-After": "1"})]})
    client = control(servers, lease_s=0.12)
    await client.hold()
    assert servers.stages().count(("a", "hold")) > 3 and servers.stages()[-1][0] == "c"
    await client.release()


async def test_a_stage_on_a_server_that_another_run_holds_is_an_error_of_its_own() -> None:
    with pytest.raises(ServerHeldError, match="finish on http://b: held by the run r2"):
        await control(Servers({"b/finish": problem(409, "held by the run r2")})).finish("1.1@r1")


async def test_a_server_that_was_started_again_is_known_by_its_boot_id_and_costs_the_others_nothing() -> None:
    fine = httpx.Response(200, json={"boot_id": "of a"})
    servers, restarted = Servers({"a/hold": [fine, httpx.Response(200, json={"boot_id": "another"})]}), []
    client = control(servers, ["http://a", "http://b"], lease_s=0.12, on_restart=restarted.append)
    await client.hold()
    await soon(lambda: bool(restarted))
    num_asked = servers.stages().count(("b", "hold"))
    await soon(lambda: servers.stages().count(("b", "hold")) > num_asked + 2)
    assert restarted == ["http://a"] and servers.stages().count(("a", "hold")) == 2
    await client.start()
    await client.release()


async def test_a_server_that_nobody_holds_was_started_again_and_is_nobody_elses() -> None:
    answer = httpx.Response(409, json={"title": "Not held", "detail": "nobody does"})
    with pytest.raises(ServerRestartedError, match="finish on http://b: nobody does"):
        await control(Servers({"b/finish": answer})).finish("1.1@r1")


async def test_a_group_goes_on_without_a_server_and_takes_it_back_behind_the_others() -> None:
    """Of 2, 1 and 4 workers; the last one comes back with 3."""
    servers = Servers()
    client = control(servers)
    await client.hold()
    client.leave_out("http://b")
    await client.connect({})
    assert {host: body["rendezvous"]["rank_offset"] for host, body in servers.bodies("connect").items()} == {
        "c": 1,
        "a": 3,
    }
    servers.answers["c/hold"] = httpx.Response(200, json={"boot_id": "new"})
    client.leave_out("http://c")
    await client.rejoin("http://c", "new", 3)
    await client.rejoin("http://b", "of b", 4)
    servers.calls.clear()
    await client.connect({})
    assert {host: body["rendezvous"]["rank_offset"] for host, body in servers.bodies("connect").items()} == {
        "a": 1,
        "c": 2,
        "b": 5,
    }
    assert client.world_sizes == [1, 3, 4] and client.boot_ids == {
        "http://a": "of a",
        "http://c": "new",
        "http://b": "of b",
    }
    await client.release()
    assert sorted(servers.bodies("release")) == ["a", "b", "c"]


async def test_a_server_that_is_left_out_is_not_told_that_the_run_lives_nor_given_back() -> None:
    servers = Servers()
    client = control(servers, lease_s=0.12)
    await client.hold()
    client.leave_out("http://b")
    await asyncio.sleep(0.05)
    servers.calls.clear()
    await soon(lambda: servers.stages().count(("a", "hold")) > 2)
    await client.release()
    assert ("b", "hold") not in servers.stages() and ("b", "release") not in servers.stages()


async def test_a_server_that_is_away_is_not_told_that_the_run_lives_until_it_is_back() -> None:
    servers = Servers()
    client = control(servers, lease_s=0.12)
    await client.hold()
    client.renew("http://b", renews=False)
    await asyncio.sleep(0.05)
    servers.calls.clear()
    await soon(lambda: servers.stages().count(("a", "hold")) > 2)
    assert ("b", "hold") not in servers.stages()
    client.renew("http://b", renews=True)
    await soon(lambda: ("b", "hold") in servers.stages())
    await client.release()


async def test_who_cannot_be_pushed_to_is_found_and_who_has_forgotten_the_run_is_held_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control_module, "_PROBE_S", 0.1)

    async def answer(request: httpx.Request) -> httpx.Response:
        host = request.url.host
        if host == "c":
            raise httpx.ConnectError("refused")
        if host == "b":
            await asyncio.sleep(3600)
        return httpx.Response(200, json={"boot_id": f"of {host}"})

    found = await control(answer).probe()
    assert found.keys() == {"http://c", "http://b"}
    assert (
        "cannot be reached: ConnectError refused" in found["http://c"] and "no answer within 0.1 s" in found["http://b"]
    )
    other = Servers({"a/hold": httpx.Response(200, json={"boot_id": "new"})})
    assert await control(other).probe() == {"http://a": "was started again"}
    dead = Servers({"a/ready": problem(503, "the engine has died"), "b/ready": httpx.ReadError("gone")})
    found = await control(dead).probe()
    assert found.keys() == {"http://a", "http://b"}
    assert found["http://a"] == "is not ready: it answers 503: the engine has died"
    assert found["http://b"].startswith("cannot be reached: ReadError gone")
    with pytest.raises(ServerHeldError, match="held by the run r2"):
        await control(Servers({"a/hold": problem(409, "held by the run r2")})).probe()


async def test_a_silent_server_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    fine = httpx.Response(200, json={"boot_id": "of a"})
    refused = [httpx.ConnectError("refused") for _ in range(4)]
    servers = Servers({"a/hold": [fine, *refused, fine, httpx.ConnectError("refused")]})
    client = control(servers, ["http://a"], lease_s=0.12)
    await client.hold()
    await soon(lambda: servers.stages().count(("a", "hold")) > 8)
    await client.release()
    assert caplog.text.count("http://a was not told that this run lives") == 2


@pytest.mark.parametrize("workers", [None, [], [{}], [{}, {}, {}], [{}, 1], {"a": 1}, "xy"])
async def test_a_report_of_each_worker_is_asked_for(workers: Any) -> None:
    servers = Servers({"c/receive": httpx.Response(200, json={"workers": workers})})
    with pytest.raises(
        WeightSyncError, match="receive on http://c: the answer is not a report of each of its 2 workers"
    ):
        await control(servers, ["http://c"]).receive({})


async def test_a_wait_is_no_longer_than_a_lease_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: (waits.append(seconds), sleep(0))[1])
    servers = Servers({"a/hold": [problem(409, "held", **{"Retry-After": "1e9"})]})
    client = control(servers, ["http://a"])
    await client.hold()
    await client.release()
    assert waits == [3601.0]


async def test_a_reason_of_several_lines_is_one() -> None:
    with pytest.raises(WeightSyncError, match=r": one two three$"):
        await control(Servers({"a/start": problem(500, "one\n two\r\nthree")})).start()


async def test_a_release_that_fails_is_no_error_for_the_server_forgets_the_run_by_itself() -> None:
    servers = Servers({"a/release": httpx.ConnectError("gone"), "b/release": problem(500, "busy")})
    client = control(servers)
    await client.hold()
    await client.release()
    assert sorted(host for host, stage in servers.stages() if stage == "release") == ["a", "b", "c"]
    await client.release()  # nothing is held any more
    assert len(servers.stages()) == 6


@pytest.mark.parametrize("answer", [{}, {"policy_version": "v"}, {"policy_version": "v", "token_logprobs": [[["x"]]]}])
async def test_an_answer_that_is_no_canary_is_refused(answer: Any) -> None:
    with pytest.raises(WeightSyncError, match=r"canary on http://.*: the answer is no CanaryScores"):
        await control(Servers({"a/canary": httpx.Response(200, json=answer)}), ["http://a"]).score_canary([[1, 2]])
