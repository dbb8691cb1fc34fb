"""The middleware around vLLM's server: which requests reach vLLM, which our handlers, and which nobody."""

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from services.rollout import middleware
from services.rollout.middleware import OUR_ROUTES, VLLM_ROUTES, RolloutGuard
from services.rollout.settings import RolloutSettings
from services.rollout.state import RolloutState

KEY = "the-key"
# Of vLLM's server: whoever reaches these controls it, runs code in its workers or reads what others sample.
VLLM_CONTROLS = [
    ("POST", "/collective_rpc"),
    ("POST", "/sleep"),
    ("POST", "/pause"),
    ("POST", "/update_weights"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/completions"),
    ("POST", "/inference/v1/generate"),
    ("GET", "/server_info"),
    ("GET", "/v1/models"),
    ("GET", "/docs"),
]


class Vllm:
    """vLLM's application: answers everything, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.failure: Exception | None = None
        engine = SimpleNamespace(check_health=self.check_health)
        self.app = SimpleNamespace(state=SimpleNamespace(engine_client=engine))

    async def check_health(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self.asked.append(("lifespan", ""))
            return
        self.asked.append((scope["method"], scope["path"]))
        await JSONResponse({"by": "vllm"})(scope, receive, send)


@pytest.fixture
def vllm() -> Vllm:
    return Vllm()


@pytest.fixture
def http(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> httpx.AsyncClient:
    """A trainer with the key of a server whose largest body is 50 bytes."""
    settings = RolloutSettings("m", "gloo", max_logprobs=4, max_completions_per_request=8, max_body_bytes=50)
    monkeypatch.setenv(*settings.to_environment().popitem())
    monkeypatch.setenv("DISTILLSERVE_ROLLOUT_KEY", KEY)
    guarded = RolloutGuard(vllm)

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        scope["app"] = vllm.app  # as vLLM's own FastAPI does
        await guarded(scope, receive, send)

    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8100", headers=headers)


async def test_only_health_and_metrics_reach_vllm(http: httpx.AsyncClient, vllm: Vllm) -> None:
    for route in sorted(VLLM_ROUTES):
        assert (await http.request(*route)).json() == {"by": "vllm"}
    assert vllm.asked == [("GET", "/health"), ("GET", "/metrics")]


@pytest.mark.parametrize("route", VLLM_CONTROLS)
async def test_the_rest_of_vllm_does_not_exist(route: tuple[str, str], http: httpx.AsyncClient, vllm: Vllm) -> None:
    response = await http.request(*route)
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
    assert response.json()["detail"] == f"{route[0]} {route[1]} is not a route of the rollout server"
    assert vllm.asked == []


@pytest.mark.parametrize("path", ["/HEALTH", "//health", "/metrics/x", "/v1/rollouts/x", "/v1"])
async def test_a_path_that_resembles_a_route_is_none(path: str, http: httpx.AsyncClient, vllm: Vllm) -> None:
    assert (await http.get(path)).status_code == 404 and vllm.asked == []


async def test_each_of_our_routes_is_answered_by_its_own_handler(
    http: httpx.AsyncClient, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[RolloutState] = []

    def named(route: tuple[str, str]) -> middleware.Handler:
        async def handler(request: Request, state: RolloutState) -> Response:
            states.append(state)
            return JSONResponse({"by": list(route)})

        return handler

    monkeypatch.setattr(middleware, "OUR_ROUTES", {route: named(route) for route in OUR_ROUTES})
    for route in OUR_ROUTES:
        assert (await http.request(*route)).json() == {"by": list(route)}
        other = "GET" if route[0] != "GET" else "DELETE"
        if (other, route[1]) not in OUR_ROUTES:
            assert (await http.request(other, route[1])).status_code == 404
    assert vllm.asked == [] and len(set(map(id, states))) == 1


@pytest.mark.parametrize("route", sorted(VLLM_ROUTES | set(OUR_ROUTES) | set(VLLM_CONTROLS)))
async def test_without_the_key_nothing_but_health_and_readiness_is_answered(
    route: tuple[str, str], http: httpx.AsyncClient, vllm: Vllm
) -> None:
    status = (await http.request(*route, headers={"Authorization": "Bearer wrong"})).status_code
    assert status == (200 if route[1] in ("/health", "/ready") else 401)
    assert vllm.asked == ([route] if route[1] == "/health" else [])


async def test_a_body_above_the_limit_of_the_settings_is_refused(http: httpx.AsyncClient, vllm: Vllm) -> None:
    response = await http.post("/v1/rollouts", content=b"x" * 51)
    assert response.status_code == 413 and "at most 50 bytes" in response.json()["detail"]


async def test_readiness_is_the_engines(http: httpx.AsyncClient, vllm: Vllm) -> None:
    assert (await http.get("/ready")).json() == {"status": "ready"}
    vllm.failure = RuntimeError("the engine is dead")
    with pytest.raises(RuntimeError, match="the engine is dead"):
        await http.get("/ready")


async def test_vllms_lifespan_is_its_own(http: httpx.AsyncClient, vllm: Vllm) -> None:
    nothing: Any = None
    await RolloutGuard(vllm)({"type": "lifespan"}, nothing, nothing)
    assert vllm.asked == [("lifespan", "")]
