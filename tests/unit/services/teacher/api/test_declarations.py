"""What the routes declare of themselves, complete and true of the code behind them."""

import json
from typing import Any

import pytest
from pydantic import BaseModel

from services.config import TeacherConfig
from services.errors import PROBLEM_MEDIA_TYPE
from services.http.guard import OPEN_PATHS
from services.teacher.api.documents import Problem, ScoreAnswer, ScoredSequence
from services.teacher.api.examples import ANSWER_EXAMPLE, REQUEST_EXAMPLES
from services.teacher.api.routes import SCORE_PATH
from services.teacher.server import create_app
from services.wire.document import SAFETENSORS_MEDIA_TYPE
from services.wire.message import PROTOCOL_VERSION
from services.wire.teacher import SCORE_COLUMNS, TeacherInfo, TeacherRequest, TeacherSequence
from tests.teacher_app import serving

STATUSES = {
    "/health": "200 500 503",
    "/ready": "200 500 503",
    "/metrics": "200 401 500",
    "/v1/teacher/info": "200 401 500 503",
    "/v1/teacher/vocabulary": "200 401 500 503",
    SCORE_PATH: "200 400 401 408 413 415 422 429 500 503",
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(TeacherConfig(model="not loaded")).openapi()


@pytest.fixture(scope="module")
def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {path: operation for path, methods in document["paths"].items() for operation in methods.values()}


def test_every_route_declares_its_statuses_and_names_its_requests(operations: dict[str, dict[str, Any]]) -> None:
    assert {path: " ".join(sorted(o["responses"])) for path, o in operations.items()} == STATUSES
    for operation in operations.values():
        (parameter,) = operation["parameters"]
        assert (parameter["name"], parameter["in"], parameter["schema"]) == (
            "X-Request-ID",
            "header",
            {"type": "string"},
        )
        assert all("X-Request-ID" in answer["headers"] for answer in operation["responses"].values())


def test_the_key_is_declared_where_the_guard_wants_it(
    document: dict[str, Any], operations: dict[str, dict[str, Any]]
) -> None:
    assert {path for path, operation in operations.items() if "security" not in operation} == OPEN_PATHS
    assert all(operation.get("security", [{"key": []}]) == [{"key": []}] for operation in operations.values())
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_every_problem_is_a_problem_document_with_an_example_of_its_status(
    operations: dict[str, dict[str, Any]],
) -> None:
    for operation in operations.values():
        for status, answer in operation["responses"].items():
            if status == "200":
                continue
            ((media_type, content),) = answer["content"].items()
            assert media_type == PROBLEM_MEDIA_TYPE
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
            assert str(Problem.model_validate(content["example"]).status) == status
            asks_to_wait = answer["headers"].get("Retry-After", {}).get("required")
            assert asks_to_wait == {"429": True, "503": False}.get(status)
            assert ("WWW-Authenticate" in answer["headers"]) == (status == "401")


def test_a_score_request_and_its_answers_are_declared(operations: dict[str, dict[str, Any]]) -> None:
    body = operations[SCORE_PATH]["requestBody"]
    assert body["required"] is True
    (content,) = body["content"].values()
    assert content == {"schema": {"$ref": "#/components/schemas/TeacherRequest"}, "examples": REQUEST_EXAMPLES}
    good = operations[SCORE_PATH]["responses"]["200"]["content"]
    assert good["application/json"]["schema"] == {"$ref": "#/components/schemas/ScoreAnswer"}
    assert good["application/json"]["examples"]["token_ids"]["value"] == ANSWER_EXAMPLE
    assert good[SAFETENSORS_MEDIA_TYPE]["schema"]["format"] == "binary"


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_every_schema_that_is_named_is_there_with_a_word_for_each_field_of_a_request(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert references(document) <= {f"#/components/schemas/{name}" for name in schemas}
    models: tuple[type[BaseModel], ...] = (
        TeacherRequest,
        TeacherSequence,
        TeacherInfo,
        Problem,
        ScoreAnswer,
        ScoredSequence,
    )
    for model in models:
        assert schemas[model.__name__]["properties"].keys() == model.model_fields.keys()
    assert all(what.get("description") for what in schemas["TeacherRequest"]["properties"].values())
    assert schemas["ScoredSequence"]["properties"].keys() == set(SCORE_COLUMNS)


@pytest.mark.parametrize("name", REQUEST_EXAMPLES)
async def test_each_example_of_a_request_is_one(name: str) -> None:
    request = TeacherRequest.model_validate(REQUEST_EXAMPLES[name]["value"])
    given = {field for field, value in request.sequences[0] if value is not None}
    assert name in given or (name == "text" and given == {"prompt", "completion"})


async def test_the_example_of_an_answer_has_the_names_of_one(tiny_model_folder: Any) -> None:
    async with serving(tiny_model_folder("qwen3")) as client:
        answer = (await client.post(SCORE_PATH, json=REQUEST_EXAMPLES["token_ids"]["value"])).json()
        with_support = (await client.post(SCORE_PATH, json=REQUEST_EXAMPLES["support_ids"]["value"])).json()
    assert answer.keys() == ANSWER_EXAMPLE.keys() == ScoreAnswer.model_fields.keys()
    assert answer["sequences"][0].keys() == ANSWER_EXAMPLE["sequences"][0].keys()
    assert with_support["sequences"][0].keys() == ScoredSequence.model_fields.keys()
    assert ScoreAnswer.model_validate(ANSWER_EXAMPLE).protocol == PROTOCOL_VERSION
    assert answer["sequences"][0]["token_ids"] == ANSWER_EXAMPLE["sequences"][0]["token_ids"]


async def test_what_is_served_is_the_document(document: dict[str, Any]) -> None:
    async with serving("not loaded", wait=False) as client:
        served = (await client.get("/openapi.json")).content
    assert json.loads(served) == document
