"""The teacher's OpenAPI document against the real server: what it shows is answered, and what is answered it shows."""

from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from services.teacher.api.documents import Problem, ScoreAnswer, ScoredSequence
from services.teacher.api.examples import ANSWER_EXAMPLE, REQUEST_EXAMPLES
from services.teacher.api.routes import SCORE_PATH
from services.wire.document import SAFETENSORS_MEDIA_TYPE
from services.wire.teacher import decode_scores
from tests.integration.processes import KEY, Server

pytestmark = pytest.mark.integration

SEED = 8101
READABLE = ("/health", "/ready", "/metrics", "/v1/teacher/info", "/v1/teacher/vocabulary")


@pytest.fixture(scope="module")
def document(teacher_server: Server) -> dict[str, Any]:
    with teacher_server.client() as client:
        return client.get("/openapi.json").json()


@pytest.mark.parametrize("name", REQUEST_EXAMPLES)
def test_each_example_of_a_request_is_answered_as_documented(
    name: str, teacher_server: Server, document: dict[str, Any]
) -> None:
    shown = document["paths"][SCORE_PATH]["post"]["requestBody"]["content"]["application/json"]["examples"]
    request = shown[name]["value"]
    with teacher_server.client() as client:
        readable = client.post(SCORE_PATH, json=request)
        binary = client.post(SCORE_PATH, json=request, headers={"Accept": SAFETENSORS_MEDIA_TYPE})
    assert (readable.status_code, binary.status_code) == (200, 200)
    answer = ScoreAnswer.model_validate(readable.json())
    assert set(readable.json()) == set(ScoreAnswer.model_fields)
    (sequence,) = readable.json()["sequences"]
    columns = set(ScoredSequence.model_fields)
    with_support = {column for column in columns if column.startswith("support_")}
    assert set(sequence) == (columns if name == "support_ids" else columns - with_support)
    assert decode_scores(binary.content).token_ids.tolist() == answer.sequences[0].token_ids
    assert all(len(row) == request["top_k"] for row in answer.sequences[0].topk_ids)


def test_the_example_of_an_answer_has_the_shape_of_one_to_its_request(teacher_server: Server) -> None:
    with teacher_server.client() as client:
        real = client.post(SCORE_PATH, json=REQUEST_EXAMPLES["token_ids"]["value"]).json()

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shape(inner) for name, inner in value.items()}
        return [shape(inner) for inner in value] if isinstance(value, list) else type(value)

    assert shape(real) == shape(ANSWER_EXAMPLE)
    assert real["sequences"][0]["token_ids"] == ANSWER_EXAMPLE["sequences"][0]["token_ids"]


def test_every_problem_has_an_example_of_its_own_status(document: dict[str, Any]) -> None:
    problems = {
        status: r for status, r in document["paths"][SCORE_PATH]["post"]["responses"].items() if status != "200"
    }
    assert sorted(problems) == ["400", "401", "408", "413", "415", "422", "429", "500", "503"]
    for status, response in problems.items():
        example = response["content"]["application/problem+json"]["example"]
        assert str(Problem.model_validate(example).status) == status
    assert problems["429"]["headers"]["Retry-After"]["required"] is True


def test_every_route_but_health_and_readiness_is_documented_to_need_the_key(document: dict[str, Any]) -> None:
    open_paths = {path for path, item in document["paths"].items() for op in item.values() if "security" not in op}
    assert open_paths == {"/health", "/ready"}
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


@pytest.fixture
def without_proxies(teacher_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """schemathesis asks some questions in sessions of its own; the teacher runs already, in the environment as it is."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for spelling in (name, name.upper()):
            monkeypatch.delenv(spelling, raising=False)


@pytest.mark.usefixtures("without_proxies")
@pytest.mark.parametrize(
    ("path", "mode", "examples"),
    [
        *((path, GenerationMode.POSITIVE, 10) for path in READABLE),
        (SCORE_PATH, GenerationMode.POSITIVE, 60),
        (SCORE_PATH, GenerationMode.NEGATIVE, 60),
        pytest.param(SCORE_PATH, GenerationMode.POSITIVE, 300, marks=pytest.mark.long),
        pytest.param(SCORE_PATH, GenerationMode.NEGATIVE, 300, marks=pytest.mark.long),
    ],
)
def test_generated_requests_are_answered_as_documented(
    path: str, mode: GenerationMode, examples: int, teacher_server: Server, document: dict[str, Any]
) -> None:
    """No 5xx; statuses, media types, headers and schemas are as documented; what the schema forbids is refused.

    That what it allows is accepted is not asked: it cannot say that ids must be in the vocabulary.
    """
    schema = schemathesis.openapi.from_dict(document)
    operation = schema[path]["POST" if path == SCORE_PATH else "GET"]
    keyed = {"Authorization": f"Bearer {KEY}"}
    with requests.Session() as session:
        session.trust_env = False

        @seed(SEED)
        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Case) -> None:
            case.call_and_validate(
                teacher_server.url, session=session, headers=keyed, excluded_checks=[positive_data_acceptance]
            )

        send()
    with teacher_server.client() as client:
        assert client.get("/health").status_code == 200
