"""The teacher's API in process: answers, refusals, the key, limits."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError
from starlette.routing import Route

from services.clients import TeacherClient
from services.config import TeacherConfig
from services.errors import PROBLEM_MEDIA_TYPE, RequestError
from services.http.guard import OPEN_PATHS
from services.teacher.api.encoding import as_dtype, as_json
from services.teacher.api.requests import encode_request
from services.wire.document import SAFETENSORS_MEDIA_TYPE
from services.wire.teacher import SCORE_COLUMNS, TeacherRequest, TeacherScores, decode_scores
from tests.servers import teacher_info
from tests.teacher_app import GOOD, AppClient, score, serving
from trainer.tiny.pair import build_tokenizer

KEY = "the-key"
VOCAB = 261


@pytest.fixture
def folder(tiny_model_folder: Callable[[str], str]) -> str:
    return tiny_model_folder("qwen3")


@pytest.fixture
async def client(folder: str) -> AsyncIterator[AppClient]:
    limits: dict[str, Any] = {
        "max_model_len": 16,
        "max_sequences_per_request": 4,
        "max_tokens_per_request": 40,
        "max_top_k": 50,
    }
    async with serving(folder, **limits) as client:
        yield client


async def test_json_and_safetensors_say_the_same(client: AppClient) -> None:
    body = {
        "sequences": [
            {"token_ids": [5, 6, 7, 8], "prompt_length": 1, "support_ids": [[1], [2], [3]]},
            {"token_ids": [9, 10], "prompt_length": 1, "support_ids": [[4]]},
        ],
        "top_k": 3,
        "temperature": 0.5,
    }
    readable = (await score(client, body)).json()
    binary = await score(client, body, accept=SAFETENSORS_MEDIA_TYPE)
    assert binary.headers["content-type"] == SAFETENSORS_MEDIA_TYPE
    scores = decode_scores(binary.content)
    assert scores.row_offsets.tolist() == [0, 3, 4] and scores.temperature == readable["temperature"] == 0.5
    assert scores.token_ids.tolist() == [6, 7, 8, 10] and scores.token_ids.dtype == np.int32
    for name in SCORE_COLUMNS:
        joined = [row for sequence in readable["sequences"] for row in sequence[name]]
        assert getattr(scores, name) == pytest.approx(np.array(joined), abs=1e-6), name
    half = decode_scores(
        (await score(client, {**body, "logprob_dtype": "float16"}, accept=SAFETENSORS_MEDIA_TYPE)).content
    )
    assert half.topk_logprobs.dtype == np.float16 and half.topk_ids.dtype == np.int32
    assert half.topk_logprobs.astype(np.float32) == pytest.approx(scores.topk_logprobs, abs=0.01)


async def test_a_binary_answer_stays_in_its_budget(client: AppClient) -> None:
    body = {"sequences": [{"token_ids": list(range(10)), "prompt_length": 1}] * 4, "top_k": 8}
    rows, k = 36, 8
    answer = await score(client, body, accept=SAFETENSORS_MEDIA_TYPE)
    assert len(answer.content) <= 8 * rows * k + 16 * rows + 2048


async def test_text_and_messages_are_tokenized_like_the_model_would(client: AppClient) -> None:
    text = {"sequences": [{"prompt": "2+2=", "completion": "4"}], "top_k": 1}
    ids = {"sequences": [{"token_ids": list(b"2+2=4"), "prompt_length": 4}], "top_k": 1}
    assert (await score(client, text)).json() == (await score(client, ids)).json()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    answer = (await score(client, {"sequences": [{"messages": messages}], "top_k": 1})).json()
    scored = answer["sequences"][0]
    assert scored["token_ids"] == [*b"yo", 256] and len(scored["token_logprobs"]) == 3  # the template writes the end


async def test_an_empty_tail_is_null_in_json(folder: str) -> None:
    async with serving(folder) as client:
        body = {"sequences": [{"token_ids": [5, 6], "prompt_length": 1}], "top_k": VOCAB}
        answer = await score(client, body)
    assert json.loads(answer.text)["sequences"][0]["tail_logprobs"] == [None]


BAD_BODIES = [
    ({"sequences": [GOOD], "top_k": -1}, "top_k", 422),
    ({"sequences": [GOOD], "top_k": 0}, "top_k", 422),
    ({"sequences": [GOOD], "top_k": 51}, "top_k", 422),
    ({"sequences": [GOOD], "top_k": True}, "top_k", 422),
    ({"sequences": [GOOD], "top_k": 1.0}, "top_k", 422),
    ({"sequences": [GOOD]}, "top_k", 422),
    ({"sequences": [], "top_k": 1}, "sequences", 422),
    ({"sequences": [GOOD] * 5, "top_k": 1}, "sequences", 413),
    ({"sequences": [{"token_ids": [5] * 16, "prompt_length": 1}] * 3, "top_k": 1}, "sequences", 413),
    ({"sequences": [{"token_ids": [5] * 17, "prompt_length": 1}], "top_k": 1}, "sequences.0.token_ids", 422),
    ({"sequences": [{"token_ids": [5, 261], "prompt_length": 1}], "top_k": 1}, "sequences.0.token_ids", 422),
    ({"sequences": [{"token_ids": [5, -1], "prompt_length": 1}], "top_k": 1}, "sequences.0.token_ids.1", 422),
    ({"sequences": [{"token_ids": [5, 2**40], "prompt_length": 1}], "top_k": 1}, "sequences.0.token_ids.1", 422),
    ({"sequences": [{"token_ids": [5, 1.5], "prompt_length": 1}], "top_k": 1}, "sequences.0.token_ids.1", 422),
    ({"sequences": [{"token_ids": [5, True], "prompt_length": 1}], "top_k": 1}, "sequences.0.token_ids.1", 422),
    ({"sequences": [{"token_ids": [5, "6"], "prompt_length": 1}], "top_k": 1}, "sequences.0.token_ids.1", 422),
    ({"sequences": [{"token_ids": [], "prompt_length": 1}], "top_k": 1}, "sequences.0.prompt_length", 422),
    ({"sequences": [{"token_ids": [5, 6], "prompt_length": 0}], "top_k": 1}, "sequences.0.prompt_length", 422),
    ({"sequences": [{"token_ids": [5, 6], "prompt_length": 2}], "top_k": 1}, "sequences.0.prompt_length", 422),
    ({"sequences": [{"token_ids": [5, 6]}], "top_k": 1}, "sequences.0", 422),
    ({"sequences": [{**GOOD, "prompt": "a", "completion": "b"}], "top_k": 1}, "sequences.0", 422),
    ({"sequences": [{"prompt": "a"}], "top_k": 1}, "sequences.0", 422),
    ({"sequences": [{}], "top_k": 1}, "sequences.0", 422),
    ({"sequences": [{"messages": [{"role": "user", "content": "a"}]}], "top_k": 1}, "sequences.0", 422),
    ({"sequences": [{**GOOD, "support_ids": [[1], [2]]}], "top_k": 1}, "sequences.0.support_ids", 422),
    ({"sequences": [{**GOOD, "support_ids": [[261]]}], "top_k": 1}, "sequences.0.support_ids", 422),
    ({"sequences": [{**GOOD, "support_ids": [[1]]}, GOOD], "top_k": 1}, "sequences", 422),
    ({"sequences": [{**GOOD, "support_ids": []}], "top_k": 1}, "sequences.0.support_ids", 422),
    ({"sequences": [{**GOOD, "support_ids": [[1, True]]}], "top_k": 1}, "sequences.0.support_ids.0.1", 422),
    (
        {"sequences": [{"token_ids": [5, 6, 7], "prompt_length": 1, "support_ids": [[1], [2, 3]]}], "top_k": 1},
        "sequences.0.support_ids",
        422,
    ),
    (
        {"sequences": [{**GOOD, "support_ids": [[1]]}, {**GOOD, "support_ids": [[1, 2]]}], "top_k": 1},
        "sequences",
        422,
    ),
    ({"sequences": [{"prompt": "a", "completion": "b", "prompt_length": 1}], "top_k": 1}, "sequences.0", 422),
    ({"sequences": [{**GOOD, **{f"key{i}": 1 for i in range(100)}}], "top_k": 1}, "sequences.0", 422),
    ({"sequences": [{"prompt": "", "completion": "b"}], "top_k": 1}, "sequences.0.prompt_length", 422),
    ({"sequences": [{"prompt": "a", "completion": ""}], "top_k": 1}, "sequences.0.prompt_length", 422),
    ({"sequences": [{"prompt": "a", "completion": "b" * 16}], "top_k": 1}, "sequences.0.token_ids", 422),
    (
        {"sequences": [{"prompt": "a", "completion": "b" * 209}], "top_k": 1},
        "sequences.0.completion",
        422,
    ),  # above 16 * 13
    ({"sequences": [{**GOOD, "prompt_length": 1.0}], "top_k": 1}, "sequences.0.prompt_length", 422),
    ({"sequences": [GOOD], "top_k": 1, "temperature": "warm"}, "temperature", 422),
    ({"sequences": [GOOD], "top_k": 1, "temperature": "1.5"}, "temperature", 422),
    ({"sequences": [GOOD], "top_k": 1, "temperature": True}, "temperature", 422),
    ({"sequences": [GOOD], "top_k": 1, "temperature": None}, "temperature", 422),
    ({"sequences": [GOOD], "top_k": 1, "temperature": 0}, "temperature", 422),
    ({"sequences": [GOOD], "top_k": 1, "temperature": -1}, "temperature", 422),
    ({"sequences": [GOOD], "top_k": 1, "logprob_dtype": "float64"}, "logprob_dtype", 422),
    ({"sequences": [GOOD], "top_k": 1, "topk": 2}, "topk", 422),
    ([], "body", 422),
]


@pytest.mark.parametrize(("body", "field", "status"), BAD_BODIES)
async def test_a_bad_request_is_a_problem_that_names_the_field(
    body: object, field: str, status: int, client: AppClient
) -> None:
    response = await score(client, body, **{"X-Request-ID": "abc-1"})
    problem = response.json()
    assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE
    assert (response.status_code, problem["status"], problem["field"]) == (status, status, field)
    assert problem["request_id"] == response.headers["x-request-id"] == "abc-1"
    assert problem["title"] and problem["detail"] and "type" in problem


@pytest.mark.parametrize(
    ("changes", "field", "detail"),
    [
        ({"temperature": 2.0}, "temperature", "temperature = 2.0, but this engine computes at temperature 1 only"),
        ({"sequences": [{**GOOD, "support_ids": [[1]]}]}, "sequences.0.support_ids", "scores no tokens of the"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(changes: dict[str, Any], field: str, detail: str) -> None:
    tokenizer = build_tokenizer()
    weak = teacher_info(tokenizer, temperature_support="one", scores_support_ids=False, engine="weak")
    request = TeacherRequest(**{"sequences": [GOOD], "top_k": 1, **changes})
    assert encode_request(request, teacher_info(tokenizer), TeacherConfig(), tokenizer)
    with pytest.raises(RequestError, match=rf"{detail}.*\(teacher.engine = weak\)") as refusal:
        encode_request(request, weak, TeacherConfig(), tokenizer)
    assert (refusal.value.status, refusal.value.field) == (422, field)


async def test_a_problem_repeats_the_wrong_value_but_not_all_of_it(client: AppClient) -> None:
    assert "(got -7)" in (await score(client, {"sequences": [GOOD], "top_k": -7})).json()["detail"]
    long = await score(client, {"sequences": [GOOD], "top_k": "x" * 10_000})
    assert len(long.content) < 500


@pytest.mark.parametrize(
    "sequences",
    [
        [{"token_ids": [1.5] * 1000, "prompt_length": 1}],
        [{**GOOD, "support_ids": [[1.5] * 1000] * 1000}],
        [{"token_ids": "no"}] * 1000,
        [{"messages": [{}] * 1000}],
        [{**GOOD, **{f"key{i}": 1 for i in range(1000)}}],
    ],
)
def test_a_flood_of_mistakes_makes_few_error_objects(sequences: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError) as caught:
        TeacherRequest.model_validate({"sequences": sequences, "top_k": 1})
    assert caught.value.error_count() <= 2  # of a message, role and content


def test_float16_keeps_what_is_possible_possible() -> None:
    rows, ids = np.array([-1.5, -1e5, -np.inf], np.float32), np.zeros((3, 1), np.int32)
    scores = TeacherScores("m", "f", 1.0, 1, np.array([0, 3]), ids[:, 0], rows, ids, rows[:, None], rows, rows)
    half = as_dtype(scores, "float16")
    assert half.token_logprobs.dtype == half.topk_logprobs.dtype == half.tail_logprobs.dtype == np.float16
    assert half.token_logprobs.tolist() == [-1.5, -65504.0, -np.inf]
    assert half.entropies.dtype == np.float32 and half.topk_ids.dtype == np.int32 and half.support_logprobs is None


def test_what_no_engine_computed_is_null_in_json() -> None:
    rows, nothing = np.array([-1.5, -2.0], np.float32), np.array([np.nan, np.nan], np.float32)
    scores = TeacherScores(
        "m", "f", 1.0, 1, np.array([0, 2]), np.array([3, 4]), rows, np.zeros((2, 1)), rows[:, None], rows, nothing
    )
    sequence = json.loads(json.dumps(as_json(scores), allow_nan=False))["sequences"][0]
    assert sequence["entropies"] == [None, None] and sequence["token_logprobs"] == [-1.5, -2.0]


@pytest.mark.parametrize(
    ("content", "status", "field", "said"),
    [
        (b"", 400, "body", "Expecting value"),
        (b"{", 400, "body", "char 1"),
        (b'{"top_k', 400, "body", "Unterminated string"),
        (b"\xff\xfe", 400, "body", "utf-8"),
        ('{"top_k": 1}'.encode("utf-16"), 400, "body", "utf-8"),
        (b'{"top_k": NaN}', 400, "body", "NaN is no JSON number"),
        (b'{"temperature": -Infinity}', 400, "body", "-Infinity is no JSON number"),
        (b'{"top_k": ' + b"9" * 5000 + b"}", 400, "body", "4300 digits"),
        (b'{"top_k": 1, "top_k": 2}', 422, "top_k", "top_k is given twice"),
        (b'{"sequences": [{"token_ids": [1], "token_ids": [2]}]}', 422, "token_ids", "given twice"),
        (b'{"temperature": 1e999, "sequences": []}', 422, "sequences", "at least 1 item"),
        (b"null", 422, "body", "valid dictionary"),
        (b"[" + b"[]," * 200 + b"[]]", 413, "body", "202 lists and objects"),  # of (40 tokens + 4 sequences) * 4
        (b"[" * 10_000, 413, "body", "10000 lists and objects"),
    ],
)
async def test_bytes_that_are_no_request_are_refused(
    content: bytes, status: int, field: str, said: str, client: AppClient
) -> None:
    headers = {"content-type": "application/json"}
    response = await client.post("/v1/teacher/logprobs", content=content, headers=headers)
    problem = response.json()
    assert (response.status_code, problem["field"]) == (status, field) and said in problem["detail"]
    assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({}, "content-type"),
        ({"content-type": "text/plain"}, "content-type"),
        ({"content-type": "application/x-www-form-urlencoded"}, "content-type"),
        ({"content-type": "application/json+x"}, "content-type"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "content-encoding"),
        ({"content-type": "application/json", "content-encoding": "x" * 1000}, "content-encoding"),
    ],
)
async def test_a_body_in_another_format_is_refused(headers: dict[str, str], field: str, client: AppClient) -> None:
    good = json.dumps({"sequences": [GOOD], "top_k": 1})
    response = await client.post("/v1/teacher/logprobs", content=good, headers=headers)
    assert (response.status_code, response.json()["field"]) == (415, field) and len(response.content) < 500


@pytest.mark.parametrize("media_type", ["Application/JSON; charset=utf-8", "application/vnd.example+json"])
async def test_json_may_be_called_by_its_other_names(media_type: str, client: AppClient) -> None:
    good, headers = json.dumps({"sequences": [GOOD], "top_k": 1}), {"content-encoding": "identity"}
    response = await client.post("/v1/teacher/logprobs", content=good, headers={"content-type": media_type, **headers})
    assert response.status_code == 200


async def test_a_body_that_does_not_arrive_in_time_loses_its_place(folder: str) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with serving(folder, transfer_timeout_s=0.05) as client:
        response = await client.post(
            "/v1/teacher/logprobs", content=stalled(), headers={"content-type": "application/json"}
        )
        assert client.service.pending == 0
    assert (response.status_code, response.json()["field"]) == (408, "body")


@pytest.mark.parametrize(
    ("sequence", "field"),
    [
        (r'{"prompt": "a\ud800", "completion": "b"}', "sequences.0.prompt"),
        (r'{"prompt": "a", "completion": "b\udfff"}', "sequences.0.completion"),
        (
            r'{"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]}',
            "sequences.0.messages",
        ),
    ],
)
async def test_half_a_surrogate_pair_is_no_text(sequence: str, field: str, client: AppClient) -> None:
    content = f'{{"sequences": [{sequence}], "top_k": 1}}'
    headers = {"content-type": "application/json"}
    response = await client.post("/v1/teacher/logprobs", content=content, headers=headers)
    assert (response.status_code, response.json()["field"]) == (422, field)


async def test_messages_that_the_chat_template_refuses_are_a_problem_in_its_words(client: AppClient) -> None:
    template = "{{ raise_exception('Conversation roles must alternate') }}"
    client.service.scorer.tokenizer.chat_template = template
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    response = await score(client, {"sequences": [{"messages": messages}], "top_k": 1})
    assert (response.status_code, response.json()["field"]) == (422, "sequences.0.messages")
    assert "Conversation roles must alternate" in response.json()["detail"]


async def test_a_chat_template_that_fails_is_the_same_problem(client: AppClient) -> None:
    client.service.scorer.tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    response = await score(client, {"sequences": [{"messages": messages}], "top_k": 1})
    assert (response.status_code, response.json()["field"]) == (422, "sequences.0.messages")
    assert "the chat template refuses sequences.0.messages: TypeError" in response.json()["detail"]


async def test_a_refusal_may_repeat_half_a_surrogate_pair(client: AppClient) -> None:
    template = "{{ raise_exception(messages[0]['content']) }}"
    client.service.scorer.tokenizer.chat_template = template
    messages = r'[{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]'
    content = f'{{"sequences": [{{"messages": {messages}}}], "top_k": 1}}'
    headers = {"content-type": "application/json"}
    response = await client.post("/v1/teacher/logprobs", content=content, headers=headers)
    assert (response.status_code, response.json()["field"]) == (422, "sequences.0.messages")


async def test_messages_need_a_chat_template(client: AppClient) -> None:
    client.service.scorer.tokenizer.chat_template = None
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    response = await score(client, {"sequences": [{"messages": messages}], "top_k": 1})
    assert response.status_code == 422 and "no chat template" in response.json()["detail"]


async def test_an_answer_that_would_be_too_large_is_refused_before_it_is_computed(folder: str) -> None:
    # 100 sequences of 12 rows with 110 candidates of 8 bytes: 1,056,000 bytes, above 1 MiB = 1,048,576
    sequence = {"token_ids": [1] * 13, "prompt_length": 1}
    async with serving(folder, max_answer_mib=1) as client:
        service = client.service
        service.scorer.engine.forward = None
        refused = await score(client, {"sequences": [sequence] * 100, "top_k": 110})
        text = (await client.get("/metrics")).text
    assert (refused.status_code, refused.json()["field"]) == (413, "top_k")
    assert "max_answer_mib = 1" in refused.json()["detail"] and "lower top_k" in refused.json()["detail"]
    assert "distillserve_teacher_rows_total 0.0" in text


async def test_unknown_routes_and_methods_are_problems_too(client: AppClient) -> None:
    for response, status in ((await client.get("/nowhere"), 404), (await client.get("/v1/teacher/logprobs"), 405)):
        assert response.status_code == status and response.headers["content-type"] == PROBLEM_MEDIA_TYPE
        assert response.json()["request_id"] == response.headers["x-request-id"]
    assert (await client.get("/v1/teacher/logprobs")).headers["allow"] == "POST"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "naïve", "a\tb"])
async def test_an_unreasonable_request_id_is_replaced(given: str, client: AppClient) -> None:
    response = await client.get("/health", headers={b"X-Request-ID": given.encode()})
    assert response.headers["x-request-id"] != given
    assert len(response.headers["x-request-id"]) == 32


async def test_every_route_but_health_and_readiness_needs_the_key(folder: str) -> None:
    async with serving(folder, key=KEY) as client:
        paths = {route.path for route in client.app.routes if isinstance(route, Route)} | {"/nowhere"}
        assert len(paths) > 7
        for path in paths - OPEN_PATHS:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"X-API-Key": KEY}):
                response = await client.get(f"{path}?key={KEY}", headers=headers)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE
        for path in OPEN_PATHS:
            assert (await client.get(path)).status_code == 200
        refused = await score(client, {"sequences": [GOOD], "top_k": 1}, Authorization="Bearer")
        assert refused.status_code == 401 and KEY not in refused.text
        accepted = await score(client, {"sequences": [GOOD], "top_k": 1}, Authorization=f"Bearer {KEY}")
        assert accepted.status_code == 200
        info = await client.get("/v1/teacher/info", headers={"Authorization": f"Bearer {KEY}"})
    assert info.status_code == 200 and info.json()["padded_vocab_size"] == VOCAB


async def test_large_bodies_are_refused_announced_or_not(folder: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    async with serving(folder, max_body_mib=1) as client:
        headers = {"content-type": "application/json"}
        announced = await client.post("/v1/teacher/logprobs", content=b" " * ((1 << 20) + 1), headers=headers)
        streamed = await client.post("/v1/teacher/logprobs", content=chunks(), headers=headers)
    for response in (announced, streamed):
        assert response.status_code == 413 and "1048576 bytes" in response.json()["detail"]
        assert response.json()["request_id"] == response.headers["x-request-id"]


async def test_the_guard_tells_of_what_it_refuses(folder: str) -> None:
    told: list[RequestError] = []
    async with serving(folder, key=KEY) as client:
        client.guard._on_refused = told.append
        await client.get("/v1/teacher/info")
        await client.get("/health")
    assert [(error.status, error.title) for error in told] == [(401, "Unauthorized")]


async def test_answers_are_counted(client: AppClient) -> None:
    await score(client, {"sequences": [{"token_ids": [5, 6, 7], "prompt_length": 1}], "top_k": 1})
    await score(client, {})
    text = (await client.get("/metrics")).text
    assert 'distillserve_teacher_requests_total{route="/v1/teacher/logprobs",status="200"} 1.0' in text
    assert 'distillserve_teacher_requests_total{route="/v1/teacher/logprobs",status="422"} 1.0' in text
    assert "distillserve_teacher_rows_total 2.0" in text and "distillserve_teacher_tokens_total 3.0" in text
    assert "distillserve_teacher_sequences_total 1.0" in text
    assert "distillserve_teacher_forward_seconds_count 1.0" in text
    assert "distillserve_teacher_wait_seconds_count 1.0" in text
    assert "distillserve_teacher_pending_requests 0.0" in text


async def test_failures_and_unknown_paths_are_counted_under_few_labels(client: AppClient) -> None:
    client.service.scorer.engine.forward = lambda _: 1 / 0
    await score(client, {"sequences": [GOOD], "top_k": 1})
    for path in ("/a", "/b"):
        await client.get(path)
    text = (await client.get("/metrics")).text
    assert 'distillserve_teacher_requests_total{route="/v1/teacher/logprobs",status="500"} 1.0' in text
    assert 'distillserve_teacher_requests_total{route="(unknown)",status="404"} 2.0' in text
    assert "distillserve_teacher_pending_requests 0.0" in text


async def test_the_client_gets_what_the_server_computes(folder: str) -> None:
    async with serving(folder) as http:
        transport = httpx.ASGITransport(http.guard)
        async with TeacherClient(["http://teacher"], transport=transport) as client:
            sequences = [([5, 6, 7], 1), ([8, 9], 1), ([10, 11, 12, 13], 2)]
            whole = await client.score(sequences, top_k=3)
            cut = await client.score(sequences, top_k=3, max_rows_per_request=2)
            assert (await client.info())[0].eos_token_ids == [256]
            assert (await client.vocabulary())["a"] == 97
    assert whole.row_offsets.tolist() == cut.row_offsets.tolist() == [0, 2, 3, 5]
    assert cut.token_logprobs == pytest.approx(whole.token_logprobs, abs=1e-5)
