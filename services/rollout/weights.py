"""The weight routes, served straight from vLLM's engine client.

    consumes   the requests of vLLM's own weight routes, at the same paths
    produces   what every worker says, or one problem document for the first that failed
    waits for  all workers; the engine does nothing else meanwhile
    unblocked  by the end of the stage in the slowest worker

vLLM's routes call methods that may raise in a worker, which disturbs every later call when there are several
(services/weight_transfer/worker.py).
"""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from services.errors import RequestError
from services.rollout.rollouts import engine_of
from services.rollout.state import RolloutState

# What the body of a stage holds for the workers.
STAGES: dict[str, tuple[str, ...]] = {
    "init_weight_transfer_engine": ("init_info",),
    "start_weight_update": (),
    "update_weights": ("update_info",),
    "finish_weight_update": (),
    "shutdown_weight_transfer_engine": (),
}


async def run_stage(request: Request, state: RolloutState) -> Response:
    """`POST /<stage>`: one stage of a push, in every worker; finish also takes the `weight_version` that is now live.

    Raises:
        RequestError: the body is not what the stage takes, or a worker failed.
    """
    stage = request.url.path.strip("/")
    body = await _body(request)
    version = body.pop("weight_version", None) if stage == "finish_weight_update" else None
    if not isinstance(version, str | None):
        raise RequestError(422, "Invalid request", f"weight_version = {version!r} must be a string")
    if body.keys() != set(STAGES[stage]):
        takes = ", ".join(STAGES[stage]) or "nothing"
        raise RequestError(422, "Invalid request", f"{stage} takes {takes} (got {', '.join(body) or 'nothing'})")
    await _in_every_worker(request, stage, "run_weight_stage", stage, body)
    if version is not None:
        await engine_of(request).update_weight_version(version)
        state.policy_version = version
    return JSONResponse({"status": "done"})


async def clear(request: Request, _: RolloutState) -> Response:
    """`POST /v1/weights/clear`: forget what a trainer that is gone has left, an unfinished update and its group.

    A paused server stays paused: what it holds now may be a mixture, and the next push resumes it.

    Raises:
        RequestError: a worker failed.
    """
    await _in_every_worker(request, "clear", "clear_weight_updates")
    return JSONResponse({"status": "done"})


async def get_status(request: Request, _: RolloutState) -> Response:
    """`GET /v1/weights/status`: the version, whether sampling is paused, and what each worker says of itself."""
    engine = engine_of(request)
    workers = await _answers(request, "weight_update_status")
    version, paused = await engine.get_weight_version(), await engine.is_paused()
    return JSONResponse({"policy_version": version, "paused": paused, "workers": workers})


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body() or b"{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(422, "Invalid request", f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError(422, "Invalid request", f"the body is a {type(body).__name__}; send a JSON object")
    return body


async def _in_every_worker(request: Request, what: str, method: str, *arguments: Any) -> None:
    problems = await _answers(request, method, *arguments)
    if failed := [f"{what} failed in worker {rank}: {said}" for rank, said in enumerate(problems) if said is not None]:
        raise RequestError(500, "Weight update failed", failed[0])


async def _answers(request: Request, method: str, *arguments: Any) -> list[Any]:
    """What each worker returns, in the order of their ranks, those of all data-parallel engines included."""
    # AsyncLLM.collective_rpc would return the first engine's answers alone.
    core = engine_of(request).engine_core
    per_engine = await core.call_utility_all_async("collective_rpc", method, None, arguments, {})
    return [answer for workers in per_engine for answer in workers]
