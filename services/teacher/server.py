"""`distillserve teacher`: the application of services/teacher/api/routes.py, its guard and its process.

On SIGTERM or SIGINT the server drains: /ready and new requests get 503 while accepted ones finish, then the
port closes. A second signal closes it at once.
"""

import asyncio
import gc
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from services.config import RunConfig, TeacherConfig
from services.config.keys import Secrets, require_key_beyond_loopback, reveal
from services.errors import DistillServeError, RequestError
from services.gpus.cards import check_driver
from services.gpus.options import computed
from services.http.bounded_connection import BoundedConnection
from services.http.connections import SERVER_IDLE_S
from services.http.guard import OPEN_PATHS, Guard, problem_response
from services.process.startup import bind, check_model_folder, check_weights
from services.teacher.api.answer_log import AnswerLog
from services.teacher.api.declarations import DESCRIPTION, openapi_document
from services.teacher.api.routes import router
from services.teacher.api.service import TeacherService

# How long accepted requests may take to finish after SIGTERM, seconds.
_GRACE_S = 60


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

    app = FastAPI(
        title="distillserve teacher",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.on_loaded = lambda task: None
    _add_error_handlers(app)
    app.include_router(router)
    app.openapi = cache(partial(openapi_document, app))  # type: ignore[method-assign]
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
