"""The routes of the teacher, and what each declares of itself (`GET /openapi.json`).

consumes   POST /v1/teacher/logprobs
produces   logprobs of the given completions, as JSON or safetensors
waits for  the queue of service.py; a client that finds it full is told so, its body unread
unblocked  by the requests before
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.http.request_body import caller_gone, read_body
from services.teacher.api import docs_page
from services.teacher.api.answer_log import SCORED
from services.teacher.api.body import check_headers
from services.teacher.api.declarations import ALL_PROBLEMS, KEY, NAMED_REQUEST, SCORE_ANSWER, SCORE_REQUEST, answers
from services.teacher.api.encoding import encode_json, encode_safetensors
from services.teacher.api.paced_response import PacedResponse
from services.teacher.api.service import TeacherService
from services.teacher.jobs import ScoreJob
from services.wire.document import SAFETENSORS_MEDIA_TYPE
from services.wire.teacher import TeacherInfo, TeacherRequest

SCORE_PATH = "/v1/teacher/logprobs"

router = APIRouter()


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


@router.get("/health", summary="The process lives", responses=answers(500, 503), openapi_extra=NAMED_REQUEST)
async def get_health(service: Service) -> dict[str, str]:
    service.check_alive()
    return {"status": "alive"}


@router.get("/ready", summary="The model is loaded", responses=answers(500, 503), openapi_extra=NAMED_REQUEST)
async def get_ready(service: Service) -> dict[str, str]:
    service.ready_scorer()
    return {"status": "ready"}


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=PlainTextResponse,
    responses=answers(401, 500),
    openapi_extra=NAMED_REQUEST,
    dependencies=[KEY],
)
async def get_metrics(service: Service) -> Response:
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get(
    "/v1/teacher/info",
    summary="Model, limits, tokenizer",
    responses=answers(401, 500, 503),
    openapi_extra=NAMED_REQUEST,
    dependencies=[KEY],
)
async def get_teacher_info(service: Service) -> TeacherInfo:
    return service.ready_scorer().info


@router.get(
    "/v1/teacher/vocabulary",
    summary="Token to id",
    responses=answers(401, 500, 503),
    openapi_extra=NAMED_REQUEST,
    dependencies=[KEY],
)
async def get_vocabulary(service: Service) -> dict[str, int]:
    return service.ready_scorer().tokenizer.get_vocab()


@router.get("/docs", include_in_schema=False)
async def get_docs(request: Request) -> Response:
    return HTMLResponse(docs_page.render(request.app.openapi()))


@router.post(
    SCORE_PATH,
    summary="Score completions",
    response_model=None,
    responses=answers(*ALL_PROBLEMS, good=SCORE_ANSWER),
    openapi_extra=SCORE_REQUEST,
    dependencies=[KEY],
)
async def create_logprobs(
    body: Annotated[TeacherRequest, Depends(_score_request)], request: Request, service: Service
) -> Response:
    """Log-probabilities of completions under the teacher, top-k candidates included."""
    job = await service.job(body)
    with _watched(request, job):
        scores = await service.score(job)
    request.scope[SCORED] = {"sequences": len(body.sequences), "rows": len(scores.token_logprobs)}
    if SAFETENSORS_MEDIA_TYPE in request.headers.get("accept", ""):
        content, media_type = await encode_safetensors(scores, body.logprob_dtype), SAFETENSORS_MEDIA_TYPE
    else:
        content, media_type = await asyncio.to_thread(encode_json, scores), "application/json"
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
