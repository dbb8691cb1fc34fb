"""`/v1/weights/...`: how a trainer changes the weights of this server, served straight from vLLM's engine client.

    hold ► connect ► pause ► start ► receive ► finish ► canary ► resume        and at the end of the run: release

    consumes   the calls of the run that holds the server, one at a time
    produces   what every worker says, or one problem document for the first that failed
    waits for  all workers of all data-parallel engines; the engines do nothing else meanwhile
    unblocked  by the end of the stage in the slowest worker, or by its deadline

The workers' methods (services/weight_transfer/worker.py) return what went wrong: one that raised would disturb every later
call where there are several workers. A holder that is gone in the middle of a push leaves nothing shut: once its lease is
over, what it began is discarded and completions are admitted again.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from services.errors import RequestError
from services.http.request_body import Body, parse_body, read_body
from services.rollout.completions import engine_of
from services.rollout.state import MIXED, RolloutState, Stage
from services.wire.weights import (
    CanaryRequest,
    CanaryScores,
    ConnectRequest,
    FinishRequest,
    HoldRequest,
    PauseRequest,
    ReceiveRequest,
    WeightCall,
)

logger = logging.getLogger(__name__)

# A worker keeps the deadline itself; its answer takes a moment more.
_ANSWER_S = 10.0
# Before whatever else waits: nobody may sample before the canary is heard.
_CANARY_PRIORITY = -1
_WATCH_S = 1.0


async def hold(request: Request, state: RolloutState) -> Response:
    """`POST /v1/weights/hold`: the server belongs to this run from now on, or for longer.

    Raises:
        RequestError: another run holds it.
    """
    body = await _body(request, state, HoldRequest)
    engine = engine_of(request)
    if state.watching is None:
        state.watching = asyncio.create_task(_watch(engine, state))
    if state.holder.hold(body.run, body.name, body.lease_s, take_over=body.take_over):
        try:
            async with _stage(state, body.run, "hold"):  # what the run before has left undone is of no use to this one
                await _reset(engine, state)
        except RequestError:
            state.holder.release(body.run)
            raise
    return JSONResponse({"boot_id": state.boot_id})


async def connect(request: Request, state: RolloutState) -> Response:
    """`POST /v1/weights/connect`: forget what an earlier push has left undone, and join the trainer's group."""
    body = await _body(request, state, ConnectRequest)
    async with _stage(state, body.run, "connect"):
        state.timeout_s = body.timeout_s
        engine = engine_of(request)
        await _discard(engine, state)
        await _in_every_worker(engine, state, "weights_connect", body.rendezvous)
    return _done()


async def pause(request: Request, state: RolloutState) -> Response:
    """`POST /v1/weights/pause`: admit nothing, let what is in flight end, drop the caches: they are of old weights."""
    body = await _body(request, state, PauseRequest)
    async with _stage(state, body.run, "pause", extra_s=body.drain_s):
        await state.admission.close(body.drain_s)
        if (
            not state.is_paused
        ):  # data-parallel engines agree on a pause by steps, for which there may be no weights now
            state.is_paused = True
            await _in_time(state, engine_of(request).pause_generation(mode="wait", clear_cache=True))
    return _done()


async def start(request: Request, state: RolloutState) -> Response:
    """`POST /v1/weights/start`: from here to `finish` the weights are neither the old nor the new ones.

    Raises:
        RequestError: completions are admitted.
    """
    body = await _body(request, state, WeightCall)
    async with _stage(state, body.run, "start"):
        if state.admission.is_open:
            raise RequestError(400, "Not paused", "the server samples; pause it before its weights change")
        await _in_every_worker(engine_of(request), state, "weights_start")
    return _done()


async def receive(request: Request, state: RolloutState) -> Response:
    """`POST /v1/weights/receive`: answers, for each worker, the checksums of what it got and the names that never came."""
    body = await _body(request, state, ReceiveRequest)
    async with _stage(state, body.run, "receive"):
        reports = await _in_every_worker(engine_of(request), state, "weights_receive", body.update)
    return JSONResponse({"workers": reports})


async def finish(request: Request, state: RolloutState) -> Response:
    """`POST /v1/weights/finish`: the trainer has found everything arrived. The engine runs again, for the canary alone."""
    body = await _body(request, state, FinishRequest)
    async with _stage(state, body.run, "finish"):
        engine = engine_of(request)
        await _set_version(
            engine, state, MIXED
        )  # what is broken off from here on must not have the name of the old ones
        await _in_every_worker(engine, state, "weights_finish", body.label)
        await _set_version(engine, state, body.label)
        await _resume(engine, state)
    return _done()


async def score_canary(request: Request, state: RolloutState) -> Response:
    """`POST /v1/weights/canary`: logprobs of given tokens in every data-parallel engine, one prefill each."""
    body = await _body(request, state, CanaryRequest)
    async with _stage(state, body.run, "canary"):
        engine = engine_of(request)
        ranks = range(engine.vllm_config.parallel_config.data_parallel_size)
        scores = [
            _score(engine, ids, rank, f"canary-{rank}-{i}") for rank in ranks for i, ids in enumerate(body.sequences)
        ]
        found = await _in_time(state, asyncio.gather(*scores))
        versions = {version for version, _ in found}
        if versions != {state.policy_version}:
            raise RequestError(
                500, "Wrong version", f"the engines answered under {sorted(versions)}, not {state.policy_version}"
            )
        if not all(math.isfinite(logprob) for _, logprobs in found for logprob in logprobs):
            raise RequestError(500, "No number", "the engine's logprobs are not finite: its weights are damaged")
        count = len(body.sequences)
        per_engine = [[logprobs for _, logprobs in found[rank * count : (rank + 1) * count]] for rank in ranks]
        answer = CanaryScores(policy_version=state.policy_version, token_logprobs=per_engine)
    return Response(answer.model_dump_json(), media_type="application/json")


async def resume(request: Request, state: RolloutState) -> Response:
    """`POST /v1/weights/resume`: everybody may sample under the new weights."""
    body = await _body(request, state, WeightCall)
    async with _stage(state, body.run, "resume"):
        state.admission.open()
    return _done()


async def release(request: Request, state: RolloutState) -> Response:
    """`POST /v1/weights/release`: the run ends. The server samples, and waits for another."""
    body = await _body(request, state, WeightCall)
    async with _stage(state, body.run, "release"):
        await _reset(engine_of(request), state)
        state.holder.release()
    return _done()


async def get_status(request: Request, state: RolloutState) -> Response:
    """`GET /v1/weights/status`: what this server and each of its workers know of their weights.

    While a stage runs the workers cannot be asked: then `workers` is null and `stage` says what is going on.
    """
    stage, workers = state.stage, None
    if stage is None and state.unanswered is not None and not state.unanswered[1].done():
        stage = state.unanswered[0]
    if stage is None:
        async with _busy(state, "status"):
            workers = await _in_every_worker(engine_of(request), state, "weights_status", is_report=True)
    lease = state.holder.lease
    status = {
        "boot_id": state.boot_id,
        "policy_version": state.policy_version,
        "holder": lease and {"run": lease.run, "name": lease.name, "since": lease.since, "left_s": state.holder.left_s},
        "admits": state.admission.is_open,
        "in_flight": state.admission.in_flight,
        "stage": stage and {"name": stage.name, "seconds": time.monotonic() - stage.started},
        "workers": workers,
    }
    return JSONResponse(status)


# ---- what the routes are made of


async def _body(request: Request, state: RolloutState, kind: type[Body]) -> Body:
    return parse_body(await read_body(request, state.settings.transfer_timeout_s), kind)


def _done() -> Response:
    return JSONResponse({"status": "done"})


@asynccontextmanager
async def _stage(state: RolloutState, run: str, name: str, extra_s: float = 0.0) -> AsyncIterator[None]:
    """One stage of the holder's push; a stage of the holder before it is waited for, which ends at its deadline.

    Args:
        extra_s: how much longer than other stages it may take.
    """
    state.holder.check(run)
    async with _busy(state, name, extra_s):
        state.holder.check(run)  # it may have been taken over meanwhile
        yield


@asynccontextmanager
async def _busy(state: RolloutState, name: str, extra_s: float = 0.0) -> AsyncIterator[None]:
    deadline = time.monotonic() + state.timeout_s + _ANSWER_S + extra_s
    try:
        async with asyncio.timeout(state.timeout_s + _ANSWER_S):
            await state.lock.acquire()
    except TimeoutError as error:
        running = state.stage.name if state.stage else "another stage"
        raise RequestError(503, "Busy", f"{running} is still running", retry_after_s=_ANSWER_S) from error
    state.stage = Stage(name, deadline)
    try:
        yield
    finally:
        state.stage = None
        state.lock.release()


async def _in_time(state: RolloutState, work: Any) -> Any:
    """The result of a call of the engine within the stage that runs.

    Raises:
        RequestError: the deadline of the stage has passed, or the engine failed or is dead.
    """
    stage, call = state.stage, asyncio.ensure_future(work)
    assert stage is not None  # _busy has set it
    # Not cancelled at the deadline: the engine answers all the same, and complains of whom it cannot reach.
    done, _ = await asyncio.wait({call}, timeout=max(0.0, stage.deadline - time.monotonic()))
    if not done:
        call.add_done_callback(lambda late: late.cancelled() or late.exception())
        state.unanswered = (stage, call)
        took_s = time.monotonic() - stage.started
        raise RequestError(504, "Deadline passed", f"{stage.name}: no answer of the engine within {took_s:.1f} s")
    try:
        return call.result()
    except EngineDeadError as error:
        raise RequestError(503, "Engine dead", "the engine of this server has died; its log says why") from error
    except RequestError:
        raise
    except Exception as error:  # vLLM passes on what went wrong in the engine as text
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(500, "Engine failed", f"the engine failed: {reason}") from error


async def _in_every_worker(
    engine: Any, state: RolloutState, method: str, *arguments: Any, is_report: bool = False
) -> list[dict[str, Any]]:
    """What each worker returns, in the order of their ranks, those of all data-parallel engines included.

    Args:
        is_report: problems are part of the answer.

    Raises:
        RequestError: a worker failed.
    """
    # AsyncLLM.collective_rpc would return the first engine's answers alone.
    call = engine.engine_core.call_utility_all_async("collective_rpc", method, None, arguments, {})
    answers = [answer for workers in await _in_time(state, call) for answer in workers]
    for rank, answer in enumerate(answers):
        if not is_report and answer["problem"] is not None:
            name = state.stage.name if state.stage else method
            raise RequestError(500, "Weight update failed", f"{name} failed in worker {rank}: {answer['problem']}")
    return answers


async def _discard(engine: Any, state: RolloutState) -> None:
    """Forget an update that was not finished; layers that it completed keep the new weights, so the whole has no version."""
    answers = await _in_every_worker(engine, state, "weights_discard")
    if any(answer["changed"] for answer in answers):
        await _set_version(engine, state, MIXED)


async def _set_version(engine: Any, state: RolloutState, label: str) -> None:
    await _in_time(state, engine.update_weight_version(label))
    state.policy_version = label


async def _resume(engine: Any, state: RolloutState) -> None:
    """Let the engine run again. One that runs already is left alone: data-parallel engines would wait for each other."""
    if state.is_paused:
        await _in_time(state, engine.resume_generation())
        state.is_paused = False


async def _reset(engine: Any, state: RolloutState) -> None:
    """Leave no trace of a trainer: no update, no group, and nothing that waits."""
    await _discard(engine, state)
    await _in_every_worker(engine, state, "weights_disconnect")
    await _resume(engine, state)
    state.admission.open()


async def _watch(engine: Any, state: RolloutState) -> None:
    """A run that is gone in the middle of a push leaves completions waiting: end that."""
    while True:
        await asyncio.sleep(_WATCH_S)
        if not _is_abandoned(state):
            continue
        try:
            async with _busy(state, "release"):
                if _is_abandoned(state):
                    await _reset(engine, state)
                    state.holder.release()
        except Exception as error:  # it is tried again, and must not end
            logger.warning("the run that held this server is gone, what it left cannot be cleared yet: %s", error)


def _is_abandoned(state: RolloutState) -> bool:
    return state.holder.left_s == 0 and not state.admission.is_open


async def _score(engine: Any, ids: list[int], rank: int, request_id: str) -> tuple[str, list[float]]:
    """The label under which an engine scores, and the logprobs of all tokens but the first."""
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    options = {"priority": _CANARY_PRIORITY, "data_parallel_rank": rank}
    async for output in engine.generate(tokens_input(ids), params, f"{request_id}-{time.monotonic_ns()}", **options):
        if output.finished:
            flat = output.prompt_logprobs
            versions = [span.version for span in output.outputs[0].weight_versions or []]
            return (versions or [""])[0], _given(ids, flat)
    raise RequestError(500, "No answer", "the engine ended a canary without an answer")


def _given(ids: list[int], flat: Any) -> list[float]:
    """The logprob of each given token but the first, from vLLM's flat prompt logprobs."""
    found = []
    for position in range(1, len(ids)):
        start, end = flat.start_indices[position], flat.end_indices[position]
        at = flat.token_ids[start:end].index(ids[position])
        found.append(flat.logprobs[start + at])
    return found


ROUTES = {
    ("POST", "/v1/weights/hold"): hold,
    ("POST", "/v1/weights/connect"): connect,
    ("POST", "/v1/weights/pause"): pause,
    ("POST", "/v1/weights/start"): start,
    ("POST", "/v1/weights/receive"): receive,
    ("POST", "/v1/weights/finish"): finish,
    ("POST", "/v1/weights/canary"): score_canary,
    ("POST", "/v1/weights/resume"): resume,
    ("POST", "/v1/weights/release"): release,
    ("GET", "/v1/weights/status"): get_status,
}
