"""The control plane of a push: ranks, versions, all-or-nothing, errors that name server and stage."""

import json
import threading

import httpx
import pytest

from services.errors import WeightSyncError
from services.weight_transfer.control import WeightControlClient

URLS = ["http://a", "http://b", "http://c"]


class Servers:
    """Answers 200 to everything but what `failing` names."""

    def __init__(self, failing: dict[str, httpx.Response | Exception] | None = None) -> None:
        self.failing = failing or {}
        self.calls: list[tuple[str, str, object]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        self.calls.append((request.url.host, request.url.path.strip("/"), body))
        answer = self.failing.get(f"{request.url.host}{request.url.path}", httpx.Response(200))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def bodies(self, stage: str) -> dict[str, object]:
        return {host: body for host, path, body in self.calls if path == stage}


def control(servers: Servers) -> WeightControlClient:
    return WeightControlClient(URLS, [2, 1, 4], "the-key", 5.0, httpx.MockTransport(servers))


def test_each_server_joins_behind_the_ranks_of_those_before_it() -> None:
    servers = Servers()
    control(servers).init_weight_transfer_engine({"master_port": 1, "rank_offset": 1})
    offsets = {
        host: body["init_info"]["rank_offset"] for host, body in servers.bodies("init_weight_transfer_engine").items()
    }  # type: ignore[index]
    assert offsets == {"a": 1, "b": 3, "c": 4}


def test_finish_announces_the_version_although_the_engine_does_not() -> None:
    servers = Servers()
    client = control(servers)
    client.version = "7"
    client.finish_weight_update()
    assert servers.bodies("finish_weight_update") == {key: {"weight_version": "7"} for key in "abc"}


def test_a_version_given_to_finish_comes_before_the_clients_own() -> None:
    servers = Servers()
    client = control(servers)
    client.version = "7"
    client.finish_weight_update("8")
    assert servers.bodies("finish_weight_update") == {key: {"weight_version": "8"} for key in "abc"}


def test_a_pause_waits_for_running_completions_and_drops_caches_of_old_weights() -> None:
    asked = []
    transport = httpx.MockTransport(lambda request: asked.append(request.url) or httpx.Response(200))
    WeightControlClient(["http://a"], [1], None, 5.0, transport).pause()
    assert [(url.path, dict(url.params)) for url in asked] == [("/pause", {"mode": "wait", "clear_cache": "true"})]


def test_every_call_has_the_deadline_of_a_stage() -> None:
    deadlines = []
    transport = httpx.MockTransport(
        lambda request: deadlines.append(request.extensions["timeout"]["read"]) or httpx.Response(200)
    )
    client = WeightControlClient(["http://a"], [1], None, 3.5, transport)
    client.start_weight_update()
    client.update_weights({})
    assert deadlines == [3.5, 3.5]


def test_all_servers_are_asked_at_once() -> None:
    together = threading.Barrier(3, timeout=10.0)  # broken unless all three calls are under way

    def answer(_: httpx.Request) -> httpx.Response:
        together.wait()
        return httpx.Response(200)

    WeightControlClient(URLS, [2, 1, 4], None, 5.0, httpx.MockTransport(answer)).update_weights({})
    assert not together.broken


def test_the_key_goes_along() -> None:
    seen = []
    client = WeightControlClient(
        ["http://a"], [1], "k", 5.0, httpx.MockTransport(lambda r: seen.append(r) or httpx.Response(200))
    )
    client.resume()
    assert seen[0].headers["authorization"] == "Bearer k"


def test_one_server_that_fails_makes_the_call_fail_and_is_named() -> None:
    servers = Servers({"b/start_weight_update": httpx.Response(500, text="out of order")})
    with pytest.raises(
        WeightSyncError, match=r"start_weight_update on http://b answered 500 after \d+\.\d s: out of order"
    ):
        control(servers).start_weight_update()
    assert set(servers.bodies("start_weight_update")) == set("abc")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            httpx.ReadTimeout("slow"),
            r"it is connected but slow: no answer within 5 s .*raise weight_sync\.stage_timeout_s",
        ),
        (httpx.ConnectError("gone"), "it cannot be reached: ConnectError gone"),
    ],
)
def test_a_stalled_or_lost_server_is_named_with_the_stage(error: Exception, said: str) -> None:
    servers = Servers({"c/update_weights": error})
    with pytest.raises(WeightSyncError, match=rf"update_weights on http://c failed after \d+\.\d s: {said}"):
        control(servers).update_weights({})


def test_what_one_server_refuses_at_once_is_not_kept_back_by_another_that_waits() -> None:
    let_go = threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "a":
            assert let_go.wait(20.0)
        return httpx.Response(200 if request.url.host == "a" else 401)

    client = WeightControlClient(["http://a", "http://b"], [1, 1], None, 5.0, httpx.MockTransport(answer))
    with pytest.raises(WeightSyncError, match="init_weight_transfer_engine on http://b answered 401"):
        client.init_weight_transfer_engine({})
    assert not let_go.is_set()
    let_go.set()


def test_clearing_what_an_earlier_trainer_left_is_one_call_to_every_server() -> None:
    servers = Servers()
    control(servers).clear_abandoned_update()
    assert sorted(servers.calls) == [(host, "v1/weights/clear", None) for host in "abc"]


def test_a_server_that_cannot_be_cleared_is_named_with_its_reason() -> None:
    problem = httpx.Response(500, json={"detail": "clear failed in worker 1: RuntimeError: lost"})
    with pytest.raises(WeightSyncError, match=r"v1/weights/clear on http://b answered 500 after .* worker 1: Runtime"):
        control(Servers({"b/v1/weights/clear": problem})).clear_abandoned_update()


def test_what_is_no_problem_document_is_shown_as_it_came() -> None:
    for answer in (httpx.Response(502, text="<html>"), httpx.Response(502, json=["<html>"])):
        with pytest.raises(WeightSyncError, match="<html>"):
            control(Servers({"b/resume": answer})).resume()
