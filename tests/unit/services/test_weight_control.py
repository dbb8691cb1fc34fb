"""The control plane of a push: ranks, versions, all-or-nothing, errors that name server and stage."""

import json

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


@pytest.mark.parametrize("error", [httpx.ReadTimeout("slow"), httpx.ConnectError("gone")])
def test_a_stalled_or_lost_server_is_named_with_the_stage(error: Exception) -> None:
    servers = Servers({"c/update_weights": error})
    with pytest.raises(WeightSyncError, match=rf"update_weights on http://c failed after .* s: {type(error).__name__}"):
        control(servers).update_weights({})


def test_clearing_an_abandoned_update_expects_refusals() -> None:
    servers = Servers({f"{host}/finish_weight_update": httpx.Response(500) for host in "abc"})
    control(servers).clear_abandoned_update()
    assert set(servers.bodies("shutdown_weight_transfer_engine")) == set("abc")
