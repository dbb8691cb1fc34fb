"""`distillserve teacher`: the teacher's logprobs over HTTP.

consumes   POST /v1/teacher/logprobs
produces   logprobs of the given completions, as JSON or safetensors
waits for  the queue of services/teacher/api/service.py; a client that finds it full is told so, its body unread
unblocked  by the requests before

On SIGTERM or SIGINT the server drains: /ready and new requests get 503 while accepted ones finish, then the
port closes. A second signal closes it at once.
"""

import asyncio
import gc
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import cache, partial
from types import FrameType
from typing import Annotated, Any

import numpy as np
import torch
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from services.config import RunConfig, TeacherConfig
from services.config.keys import Secrets, require_key_beyond_loopback, reveal
from services.errors import DistillServeError, RequestError
from services.gpus.cards import check_driver
from services.gpus.options import computed
from services.http.bounded_connection import BoundedConnection
from services.http.connections import SERVER_IDLE_S
from services.http.guard import OPEN_PATHS, Guard, problem_response
from services.http.request_body import caller_gone, read_body
from services.process.startup import bind, check_model_folder, check_weights
from services.teacher.api import docs_page
from services.teacher.api.answer import PacedResponse
from services.teacher.api.answer_log import SCORED, AnswerLog
from services.teacher.api.body import check_headers
from services.teacher.api.openapi import SCORE_PATH, describe
from services.teacher.api.service import TeacherService
from services.teacher.jobs import ScoreJob
from services.wire.document import SAFETENSORS_MEDIA_TYPE
from services.wire.teacher import TeacherInfo, TeacherRequest, TeacherScores, encode_scores

# How long accepted requests may take to finish after SIGTERM, seconds.
_GRACE_S = 60
# Copied in less time than it takes to wake another thread.
_SMALL_NUM_CANDIDATES = 8192


def create_app(config: TeacherConfig) -> FastAPI:
    """The application without its guard; the model is loaded in the background once it runs."""
    service = TeacherService(config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.load())
        loading.add_done_callback(lambda task: app.state.on_loaded(task))
        yield
        service.draining = True
        loading.cancel()
        service.close()

    app = FastAPI(title="distillserve teacher", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.state.on_loaded = lambda task: None
    _add_error_handlers(app)
    app.add_api_route("/health", get_health, methods=["GET"], summary="The process lives")
    app.add_api_route("/ready", get_ready, methods=["GET"], summary="The model is loaded")
    app.add_api_route(
        "/metrics", get_metrics, methods=["GET"], summary="Prometheus metrics", response_class=PlainTextResponse
    )
    app.add_api_route("/v1/teacher/info", get_teacher_info, methods=["GET"], summary="Model, limits, tokenizer")
    app.add_api_route("/v1/teacher/vocabulary", get_vocabulary, methods=["GET"], summary="Token to id")
    app.add_api_route(SCORE_PATH, create_logprobs, methods=["POST"], summary="Score completions", response_model=None)
    app.add_api_route("/docs", get_docs, methods=["GET"], include_in_schema=False)
    app.openapi = cache(partial(describe, app))  # type: ignore[method-assign]
    return app


def guarded(app: FastAPI, key: str | None) -> Guard:
    """What listens: the application behind its key, its limits, its metrics and its log."""
    service: TeacherService = app.state.service
    return Guard(
        app,
        key=key,
        open_paths=OPEN_PATHS,
        max_body_bytes=service.config.max_body_mib << 20,
        on_refused=lambda error: service.metrics.rejected.labels(error.title).inc(),
        on_answered=AnswerLog(service.config, service.metrics),
    )


async def _service(request: Request) -> TeacherService:
    return request.app.state.service


Service = Annotated[TeacherService, Depends(_service)]


async def _place(service: Service) -> AsyncIterator[None]:
    """Taken before the body is read, so that a flood of large bodies costs no memory, and kept until the answer is sent."""
    with service.place():
        yield


async def _score_request(
    request: Request, service: Service, _: Annotated[None, Depends(_place, scope="request")]
) -> TeacherRequest:
    check_headers(request.headers)
    body = await read_body(request, service.config.transfer_timeout_s)
    return await service.parse(body)


async def get_health(service: Service) -> dict[str, str]:
    service.check_alive()
    return {"status": "alive"}


async def get_ready(service: Service) -> dict[str, str]:
    service.ready_scorer()
    return {"status": "ready"}


async def get_metrics(service: Service) -> Response:
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def get_teacher_info(service: Service) -> TeacherInfo:
    return service.ready_scorer().info


async def get_vocabulary(service: Service) -> dict[str, int]:
    return service.ready_scorer().tokenizer.get_vocab()


async def get_docs(request: Request) -> Response:
    return HTMLResponse(docs_page.render(request.app.openapi()))


async def create_logprobs(
    body: Annotated[TeacherRequest, Depends(_score_request)], request: Request, service: Service
) -> Response:
    """Log-probabilities of completions under the teacher, top-k candidates included."""
    job = await service.job(body)
    with _watched(request, job):
        scores = await service.score(job)
    request.scope[SCORED] = {"sequences": len(body.sequences), "rows": len(scores.token_logprobs)}
    if SAFETENSORS_MEDIA_TYPE in request.headers.get("accept", ""):
        content, media_type = await _encode_safetensors(scores, body.logprob_dtype), SAFETENSORS_MEDIA_TYPE
    else:
        content, media_type = await asyncio.to_thread(_encode_json, scores), "application/json"
    return PacedResponse(content, media_type, service.config.transfer_timeout_s)


@contextmanager
def _watched(request: Request, job: ScoreJob) -> Iterator[None]:
    """Refuses the job when its caller hangs up: what has not begun is never scored."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.refuse(caller_gone("the caller went away before its turn"))

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def _as_dtype(scores: TeacherScores, dtype: str) -> TeacherScores:
    """Logprobs in `dtype`; one below the least float16 becomes that, for minus infinity would mean "impossible"."""
    if dtype == "float32":
        return scores
    least = np.finfo(dtype).min

    def narrowed(values: np.ndarray) -> np.ndarray:
        return np.where(np.isneginf(values), values, np.maximum(values, least)).astype(dtype)

    columns: dict[str, Any] = {n: narrowed(v) for n, v in scores.columns().items() if n.endswith("logprobs")}
    return replace(scores, **columns)


def as_json(scores: TeacherScores) -> dict[str, Any]:
    """The readable answer; JSON has no word for minus infinity (no mass outside the candidates) and NaN: both are null."""

    def listed(values: np.ndarray) -> list[Any]:
        if values.dtype.kind != "f" or np.isfinite(values).all():
            return values.tolist()
        return np.where(np.isfinite(values), values.astype(object), np.array(None)).tolist()

    columns, bounds = scores.columns(), zip(scores.row_offsets[:-1], scores.row_offsets[1:], strict=True)
    sequences = [{name: listed(values[start:end]) for name, values in columns.items()} for start, end in bounds]
    return {**scores.metadata(), "sequences": sequences}


async def _encode_safetensors(scores: TeacherScores, dtype: str) -> bytes:
    narrowed = _as_dtype(scores, dtype)
    if scores.topk_ids.size <= _SMALL_NUM_CANDIDATES:
        return encode_scores(narrowed)
    return await asyncio.to_thread(encode_scores, narrowed)


def _encode_json(scores: TeacherScores) -> bytes:
    return json.dumps(as_json(scores), allow_nan=False, separators=(",", ":")).encode()


def _add_error_handlers(app: FastAPI) -> None:
    """Every error of every route becomes a problem document."""

    def problem(request: Request, error: RequestError) -> Response:
        if error.status < 500 or error.retry_after_s is not None:
            app.state.service.metrics.rejected.labels(error.title).inc()
        return problem_response(error)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return problem(request, error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        detail = f"{request.method} {request.url.path}: {error.detail}"
        response = problem(request, RequestError(error.status_code, str(error.detail), detail))
        response.headers.update(error.headers or {})  # Allow of a 405
        return response

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        known = isinstance(error, DistillServeError)
        detail = str(error) if known else "an unexpected error; the server's log has the traceback"
        return problem(request, RequestError(500, "Server error", detail))


class DrainingServer(uvicorn.Server):
    """uvicorn, except that the port stays open until accepted requests are answered."""

    def __init__(self, config: uvicorn.Config, service: TeacherService) -> None:
        super().__init__(config)
        self._service = service
        self._deadline = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if not self._service.draining:
            self._service.draining = True
            self._deadline = time.monotonic() + _GRACE_S
            self.should_exit = False

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining and (self._service.pending == 0 or time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)


def run(config: RunConfig) -> None:
    """Serve until SIGTERM or SIGINT; accepted requests are finished first.

    Raises:
        ConfigError: no teacher, a public address without a key, or no room on the GPU.
        StartupError: the port is taken, the model cannot be loaded, or the GPU cannot be used.
        DistillServeError: the engine broke while it served.
    """
    config.require("teacher")
    teacher, key = config.teacher, Secrets().teacher_key
    require_key_beyond_loopback("teacher", teacher.host, key)
    is_vllm = teacher.engine == "vllm"
    # transformers says in one line that it finds no weights that it may read, vLLM in pages.
    is_checked = is_vllm and "load_format" not in teacher.engine_args
    (check_weights if is_checked else check_model_folder)("teacher.model", teacher.model or "")
    if is_vllm or teacher.device != "cpu":
        check_driver(torch.cuda.is_available(), runs_on_cpu=not is_vllm)
    teacher = computed(config, "teacher").teacher
    listener = bind("teacher", teacher.host, teacher.port)
    app = create_app(teacher)
    service: TeacherService = app.state.service
    options = uvicorn.Config(
        guarded(app, reveal(key)),
        http=BoundedConnection,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=SERVER_IDLE_S,
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = DrainingServer(options, service)
    failures: list[BaseException] = []

    def on_loaded(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            failures.append(error)
            server.should_exit = True
        # What is loaded stays: to look through it for garbage takes 0.2 s, in which nobody is answered.
        gc.collect()
        gc.freeze()

    def on_failure(error: Exception) -> None:
        failures.append(DistillServeError(f"the teacher's engine failed: {type(error).__name__}: {error}"))
        server.should_exit = True

    app.state.on_loaded, service.on_failure = on_loaded, on_failure
    # uvicorn raises the signal that ended it once more when it is done; an orderly end on SIGTERM is a success.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run(sockets=[listener])
    gc.unfreeze()  # or libraries complain at the exit of what was not collected
    if failures:
        raise failures[0]
