"""What the routes declare of themselves for `GET /openapi.json`, beyond what FastAPI reads from their signatures."""

from typing import Any

from fastapi import FastAPI, Security
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from pydantic.json_schema import models_json_schema

from services.errors import PROBLEM_MEDIA_TYPE
from services.teacher.api.documents import Problem, ScoreAnswer
from services.teacher.api.examples import ANSWER_EXAMPLE, REQUEST_EXAMPLES
from services.wire.document import SAFETENSORS_MEDIA_TYPE
from services.wire.teacher import TeacherRequest

DESCRIPTION = """\
Log-probabilities of given completions under the teacher.

With DISTILLSERVE_TEACHER_KEY set on the server, every route but /health and /ready needs `Authorization: Bearer KEY`.
Every answer has an X-Request-ID: the caller's own, if it is 1 to 128 of A-Z a-z 0-9 . _ : -, or a new one.
"""

KEY = Security(HTTPBearer(scheme_name="key", description="DISTILLSERVE_TEACHER_KEY of the server.", auto_error=False))
"""Of a route that needs the key. It is the guard (services/http/guard.py) that refuses who has none."""

_SCHEMAS = "#/components/schemas/{model}"
_REQUEST_ID = {
    "X-Request-ID": {"description": "The caller's X-Request-ID, or a new one.", "schema": {"type": "string"}}
}
_RETRY_AFTER = {"description": "When to ask again, seconds.", "schema": {"type": "integer", "minimum": 1}}
_WWW_AUTHENTICATE = {"description": "Bearer", "schema": {"type": "string"}}

# Per status: title of its example, detail and field of its example, what it means.
_PROBLEMS: dict[int, tuple[str, str, str | None, str]] = {
    400: ("Not JSON", "the body is not JSON in UTF-8: Expecting value: line 1 column 1 (char 0)", "body", "Not JSON."),
    401: ("Unauthorized", "a valid key is required: send `Authorization: Bearer KEY`", None, "No key, or a wrong one."),
    408: ("Request timeout", "the body did not arrive within 120 s (transfer_timeout_s)", "body", "The body stalled."),
    413: ("Over a limit", "5000 sequences in sequences, at most 4096 are served", "sequences", "Send less at once."),
    415: (
        "Unsupported media type",
        "content-type says 'text/csv', must be application/json",
        "content-type",
        "The body is not application/json, or compressed.",
    ),
    422: (
        "Invalid request",
        "top_k: Input should be greater than or equal to 1 (got -1)",
        "top_k",
        "JSON, but no request within the limits of /v1/teacher/info.",
    ),
    429: (
        "Too many requests",
        "64 requests wait already (max_pending_requests); try again later",
        None,
        "The queue is full; the body was not read.",
    ),
    500: (
        "Server error",
        "an unexpected error; the server's log has the traceback",
        None,
        "A bug, or a model whose logits are not finite.",
    ),
    503: (
        "Loading",
        "the teacher is still being loaded",
        None,
        "Loading or shutting down, with Retry-After; or the engine failed, without.",
    ),
}

ALL_PROBLEMS = tuple(_PROBLEMS)

# No parameter of the functions: FastAPI would declare that it refuses a request for it, in a shape of its own.
NAMED_REQUEST: dict[str, Any] = {
    "parameters": [
        {
            "name": "X-Request-ID",
            "in": "header",
            "description": "Names the request in the answer and in the server's log.",
            "schema": {"type": "string"},
        }
    ]
}

# Nor is the body one: it is read after the request has its place.
SCORE_REQUEST: dict[str, Any] = {
    **NAMED_REQUEST,
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": _SCHEMAS.format(model=TeacherRequest.__name__)},
                "examples": REQUEST_EXAMPLES,
            }
        },
    },
}

SCORE_ANSWER: dict[str, Any] = {
    "model": ScoreAnswer,
    "content": {
        "application/json": {"examples": {"token_ids": {"summary": "To the first request", "value": ANSWER_EXAMPLE}}},
        SAFETENSORS_MEDIA_TYPE: {
            "schema": {
                "type": "string",
                "format": "binary",
                "description": "With `Accept: application/x-safetensors`: the same names over the rows of all sequences, "
                "row_offsets int64[B+1], ids int32, logprobs in logprob_dtype; the scalars are metadata, as JSON.",
            }
        },
    },
}


def answers(*problems: int, good: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route.

    Args:
        problems: the other statuses that it may answer.
        good: what there is to say of a 200 beyond the function's signature.
    """
    return {200: {**(good or {}), "headers": _REQUEST_ID}, **{status: _problem(status) for status in problems}}


def _problem(status: int) -> dict[str, Any]:
    title, detail, field, meaning = _PROBLEMS[status]
    headers: dict[str, Any] = dict(_REQUEST_ID)
    if status in (429, 503):
        headers["Retry-After"] = {**_RETRY_AFTER, "required": status == 429}
    if status == 401:
        headers["WWW-Authenticate"] = _WWW_AUTHENTICATE
    example = {"type": "about:blank", "title": title, "status": status, "detail": detail, "request_id": "abc-1"}
    content = {
        "schema": {"$ref": _SCHEMAS.format(model=Problem.__name__)},
        "example": {**example, **({"field": field} if field else {})},
    }
    return {"description": meaning, "headers": headers, "content": {PROBLEM_MEDIA_TYPE: content}}


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the schemas that it does not collect: of the body that is read by hand, and of problems."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, found = models_json_schema([(TeacherRequest, "validation"), (Problem, "validation")], ref_template=_SCHEMAS)
    document["components"]["schemas"] |= found["$defs"]
    return document
