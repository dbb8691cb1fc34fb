"""What `GET /openapi.json` says beyond the signatures of the routes: every answer, its schema, and examples to copy.

The examples are requests and answers of a real server (tests/integration/test_teacher_openapi.py sends each).
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from services.errors import PROBLEM_MEDIA_TYPE
from services.http.guard import OPEN_PATHS
from services.wire.document import SAFETENSORS_MEDIA_TYPE
from services.wire.teacher import TeacherRequest

SCORE_PATH = "/v1/teacher/logprobs"

_DESCRIPTION = """\
Log-probabilities of given completions under the teacher.

With DISTILLSERVE_TEACHER_KEY set on the server, every route but /health and /ready needs `Authorization: Bearer KEY`.
Every answer has an X-Request-ID: the caller's own, if it is 1 to 128 of A-Z a-z 0-9 . _ : -, or a new one.
"""


class Documented(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Problem(Documented):
    """Why a request was not answered (RFC 9457)."""

    type: str
    title: str
    """The kind of problem, always in the same words."""
    status: int
    detail: str
    """What was wrong with this request, and what would be right."""
    request_id: str
    """The X-Request-ID of this answer."""
    field: str | None = None
    """Dotted path of the offending field, or the name of the offending header; absent where there is none."""


class ScoredSequence(Documented):
    """Scores of one sequence; lists have one entry per completion token ("row"). null: no finite number."""

    token_ids: list[int]
    """The scored tokens: of a text, how it was tokenized."""
    token_logprobs: list[float | None]
    """Logprob of each scored token, nats."""
    topk_ids: list[list[int]]
    """[rows][K] likeliest tokens, by falling logprob, equal ones by rising id."""
    topk_logprobs: list[list[float | None]]
    """[rows][K]"""
    tail_logprobs: list[float | None]
    """Log of the mass outside the top-k; null: there is none."""
    entropies: list[float | None]
    """Nats; null: this engine computes none."""
    support_logprobs: list[list[float | None]] | None = None
    """[rows][M] logprobs of support_ids; absent without them."""
    support_tail_logprobs: list[float | None] | None = None
    """Log of the mass outside support_ids; absent without them."""


class ScoreAnswer(Documented):
    """The scores of a request; names may be added within protocol 1."""

    protocol: int
    model: str
    fingerprint: str
    """Equal for replicas."""
    temperature: float
    top_k: int
    sequences: list[ScoredSequence]
    """In the order of the request."""


REQUEST_EXAMPLES: dict[str, Any] = {
    "token_ids": {
        "summary": "Token ids: the last of three is scored, with the 2 likeliest candidates",
        "value": {"sequences": [{"token_ids": [50, 43, 61], "prompt_length": 2}], "top_k": 2},
    },
    "text": {
        "summary": "A prompt and its completion as text",
        "value": {"sequences": [{"prompt": "47+85=", "completion": "132"}], "top_k": 3, "temperature": 0.7},
    },
    "messages": {
        "summary": "A conversation, whose last message is scored",
        "value": {
            "sequences": [
                {"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]},
            ],
            "top_k": 1,
        },
    },
    "support_ids": {
        "summary": "Further tokens of the caller's choice: two for each of two rows",
        "value": {
            "sequences": [{"token_ids": [50, 43, 50, 61], "prompt_length": 2, "support_ids": [[48, 49], [61, 10]]}],
            "top_k": 1,
            "logprob_dtype": "float16",
        },
    },
}

ANSWER_EXAMPLE: dict[str, Any] = {
    "protocol": 1,
    "model": "/models/teacher",
    "fingerprint": "8c1f0a6de2b74935",
    "temperature": 1.0,
    "top_k": 2,
    "sequences": [
        {
            "token_ids": [61],
            "token_logprobs": [-0.25],
            "topk_ids": [[61, 43]],
            "topk_logprobs": [[-0.25, -1.75]],
            "tail_logprobs": [-3.03],
            "entropies": [0.84],
        }
    ],
}

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

_STATUSES: dict[str, list[int]] = {
    "/health": [500, 503],
    "/ready": [500, 503],
    "/metrics": [401, 500],
    "/v1/teacher/info": [401, 500, 503],
    "/v1/teacher/vocabulary": [401, 500, 503],
    SCORE_PATH: sorted(_PROBLEMS),
}

_REQUEST_ID_HEADER = {"description": "The caller's X-Request-ID, or a new one.", "schema": {"type": "string"}}
_RETRY_AFTER_HEADER = {"description": "When to ask again, seconds.", "schema": {"type": "integer", "minimum": 1}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the teacher's application."""
    document = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
    names = models_json_schema(
        [(model, "validation") for model in (TeacherRequest, ScoreAnswer, Problem)],
        ref_template="#/components/schemas/{model}",
    )[1]
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(names["$defs"])
    components["headers"] = {"X-Request-ID": _REQUEST_ID_HEADER, "Retry-After": _RETRY_AFTER_HEADER}
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "DISTILLSERVE_TEACHER_KEY of the server."}
    }
    components["responses"] = {f"Problem{status}": _problem(status) for status in _PROBLEMS}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(path, operation)
    _describe_scoring(document["paths"][SCORE_PATH]["post"])
    return document


def _complete(path: str, operation: dict[str, Any]) -> None:
    operation["responses"]["200"]["headers"] = {"X-Request-ID": _ref("headers", "X-Request-ID")}
    for status in _STATUSES[path]:
        operation["responses"][str(status)] = _ref("responses", f"Problem{status}")
    operation["parameters"] = [
        {
            "name": "X-Request-ID",
            "in": "header",
            "description": "Names the request in the answer and in the server's log.",
            "schema": {"type": "string"},
        }
    ]
    if path not in OPEN_PATHS:
        operation["security"] = [{"key": []}]


def _describe_scoring(operation: dict[str, Any]) -> None:
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": _ref("schemas", "TeacherRequest"), "examples": REQUEST_EXAMPLES}},
    }
    operation["responses"]["200"]["content"] = {
        "application/json": {
            "schema": _ref("schemas", "ScoreAnswer"),
            "examples": {"token_ids": {"summary": "To the first request", "value": ANSWER_EXAMPLE}},
        },
        SAFETENSORS_MEDIA_TYPE: {
            "schema": {
                "type": "string",
                "format": "binary",
                "description": "With `Accept: application/x-safetensors`: the same names over the rows of all sequences, "
                "row_offsets int64[B+1], ids int32, logprobs in logprob_dtype; the scalars are metadata, as JSON.",
            }
        },
    }


def _problem(status: int) -> dict[str, Any]:
    title, detail, field, meaning = _PROBLEMS[status]
    example = {"type": "about:blank", "title": title, "status": status, "detail": detail, "request_id": "abc-1"}
    headers = {"X-Request-ID": _ref("headers", "X-Request-ID")}
    if status in (429, 503):
        headers["Retry-After"] = {**_RETRY_AFTER_HEADER, "required": status == 429}  # type: ignore[dict-item]
    if status == 401:
        headers["WWW-Authenticate"] = {"description": "Bearer", "schema": {"type": "string"}}  # type: ignore[dict-item]
    content = {"schema": _ref("schemas", "Problem"), "example": {**example, **({"field": field} if field else {})}}
    return {"description": meaning, "headers": headers, "content": {PROBLEM_MEDIA_TYPE: content}}


def _ref(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}
