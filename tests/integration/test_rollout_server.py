"""The rollout server as its clients see it: completions, limits, the guard around vLLM's own routes."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from services.clients import RolloutClient
from services.errors import ProblemError
from services.http.guard import OPEN_PATHS
from services.rollout.middleware import OUR_ROUTES, VLLM_ROUTES
from services.wire.rollout import RolloutSampling
from tests.integration.attach import attached
from tests.integration.processes import KEY, Server
from tests.pushing import learner_of

pytestmark = pytest.mark.integration


async def test_completions_carry_logprobs_of_the_policy_that_sampled(
    rollout_server: Server, models: dict[str, str]
) -> None:
    async with RolloutClient([rollout_server.url], key=KEY) as client:
        info = (await client.info())[0]
        sampling = RolloutSampling(max_new_tokens=8, temperature=0.7)
        completions = await client.generate([[60, 61], [70]], sampling, samples_per_prompt=3, student_top_k=4)
    assert info.model == models["qwen3"] and info.weight_transfer_backend == "gloo" and info.max_model_len == 128
    assert [(c.prompt_index, c.sample_index) for c in completions] == [(p, s) for p in range(2) for s in range(3)]
    for completion in completions:
        length = len(completion.token_ids)
        assert completion.rollout_logprobs.shape == (length,)
        assert completion.policy_versions[0].start == 0 and completion.policy_versions[-1].end == length
        assert completion.truncated == (length == 8 and completion.finish_reason == "length")
        # The top-k comes without the sampled token that vLLM puts first, sorted, as logprobs of the same policy.
        assert completion.student_topk_ids is not None and completion.student_topk_logprobs is not None
        assert completion.student_topk_ids.shape == (length, 4)
        assert (np.diff(completion.student_topk_logprobs, axis=1) <= 0).all()
        for token, logprob, ids, logprobs in zip(
            completion.token_ids,
            completion.rollout_logprobs,
            completion.student_topk_ids,
            completion.student_topk_logprobs,
            strict=True,
        ):
            assert len(set(ids.tolist())) == 4
            if token in ids:
                assert logprobs[list(ids).index(token)] == pytest.approx(logprob, abs=1e-6)


async def test_greedy_completions_are_the_models_own(rollout_server: Server, models: dict[str, str]) -> None:
    learner = learner_of(models["qwen3"])
    model = learner.student.model
    async with attached(learner, rollout_server.url) as (pushing, client):
        await pushing.push(0)  # a push test may have been here before
        completion = (await client.generate([[60, 61, 62]], RolloutSampling(max_new_tokens=8, temperature=0.0)))[0]
    ids = [60, 61, 62]
    for token in completion.token_ids.tolist():
        with torch.no_grad():
            assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


@pytest.mark.parametrize(
    ("change", "field", "status"),
    [
        ({"prompts": []}, "prompts", 422),
        ({"prompts": [[]]}, "prompts", 422),
        ({"prompts": [[1.5]]}, "prompts", 422),
        ({"prompts": [[True]]}, "prompts", 422),
        ({"prompts": [[10**6]]}, "prompts.0", 422),
        ({"prompts": [[1] * 200]}, "prompts.0", 422),
        ({"samples_per_prompt": 10**6}, "prompts", 413),
        ({"student_top_k": 1000}, "student_top_k", 422),
        ({"sampling": {"max_new_tokens": 0}}, "sampling.max_new_tokens", 422),
        ({"sampling": {"max_new_tokens": 4, "temperature": -1}}, "sampling.temperature", 422),
        ({"unknown": 1}, "unknown", 422),
    ],
)
def test_bad_requests_are_refused_with_the_field(rollout_server: Server, change: dict, field: str, status: int) -> None:
    body = {"prompts": [[5]], "sampling": {"max_new_tokens": 4}, **change}
    with rollout_server.client() as client:
        response = client.post("/v1/rollouts", json=body)
    problem = response.json()
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["field"].startswith(field) and problem["request_id"] == response.headers["x-request-id"]


def vllm_routes() -> set[tuple[str, str]]:
    """(method, path) of every route that any part of the installed vLLM declares, whether this server has it or not."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    sources = (Path(spec.origin).parent / "entrypoints").rglob("*.py")
    declared = re.compile(r"@\w*(?:router|app)\.(get|post|put|patch|delete|head)\(\s*\"(/[^\"]*)\"")
    return {(method.upper(), path) for source in sources for method, path in declared.findall(source.read_text())}


def all_routes() -> list[tuple[str, str]]:
    routes = vllm_routes()
    assert len(routes) > 40 and {("POST", "/v1/chat/completions"), ("POST", "/collective_rpc")} <= routes
    documentation = {("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/redoc")}
    odd = {
        ("GET", "/no-such-route"),
        ("GET", "//health"),
        ("GET", "/health/"),
        ("GET", "/metrics/"),
        ("OPTIONS", "/metrics"),
    }
    return sorted(routes | documentation | odd | set(VLLM_ROUTES) | set(OUR_ROUTES))


def test_no_route_answers_without_the_key_except_health_and_readiness(rollout_server: Server) -> None:
    with rollout_server.client() as client:
        for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            for method, path in all_routes():
                if path in OPEN_PATHS:
                    continue
                response = client.request(method, f"{path}?key={KEY}&api_key={KEY}", headers=headers)
                assert response.status_code == 401, (method, path)
                assert response.headers["content-type"] == "application/problem+json"
        for path in OPEN_PATHS:
            assert client.get(path, headers={"Authorization": ""}).status_code == 200


def test_no_route_answers_a_web_page(rollout_server: Server) -> None:
    page = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    with rollout_server.client() as client:
        for key in (f"Bearer {KEY}", ""):
            for method, path in all_routes():
                response = client.request(method, path, headers={**page, "Authorization": key})
                assert response.status_code == 403, (method, path)
                assert "access-control-allow-origin" not in response.headers
        assert client.get("/v1/weights/status").json()["admits"]


def test_load_balancers_may_ask_with_head(rollout_server: Server) -> None:
    with rollout_server.client() as client:
        for path in OPEN_PATHS:
            response = client.head(path, headers={"Authorization": ""})
            assert (response.status_code, response.content) == (200, b"")
            assert client.get(path).status_code == 200  # the connection is still in step


def test_vllm_routes_that_the_trainer_does_not_need_are_closed_even_with_the_key(rollout_server: Server) -> None:
    with rollout_server.client() as client:
        for method, path in set(all_routes()) - VLLM_ROUTES - set(OUR_ROUTES):
            response = client.request(method, path, json={})
            assert (response.status_code, response.json()["title"]) == (404, "Not found"), (method, path)


async def test_a_refusal_is_not_retried(rollout_server: Server) -> None:
    async with RolloutClient([rollout_server.url], key="wrong") as client:
        with pytest.raises(ProblemError, match="key is required"):
            await client.info()
