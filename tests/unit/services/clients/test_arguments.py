"""What callers hand to the clients: arrays become lists, and what cannot be sent is refused before anything is."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from services.clients import BlockingTeacherClient, RolloutClient, TeacherClient
from services.clients.plain_vllm import VllmTeacherClient
from services.errors import ClientClosedError, DistillServeError, InputError
from services.wire.rollout import RolloutSampling
from tests.unit.services.clients.answers import completed, scored
from tests.unit.services.weight_transfer.controls import control

URL = "http://a:1"
SAMPLING = RolloutSampling(max_new_tokens=4)
SURROGATE = "a\ud800"
KINDS: dict[str, Callable[..., Any]] = {
    "list": list,
    "tuple": tuple,
    "range": lambda ids: range(ids[0], ids[-1] + 1),
    "numpy integers": lambda ids: [np.int32(i) for i in ids],
    "numpy array": lambda ids: np.array(ids, np.uint16),
    "tensor": torch.tensor,
    "tensors": lambda ids: [torch.tensor(i) for i in ids],
}


class Recorder:
    """Passes requests to `handler` and keeps what they said."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler
        self.bodies: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.content))
        return self.handler(request)


@pytest.mark.parametrize("kind", KINDS)
async def test_ids_may_be_of_any_kind_of_integers(kind: str) -> None:
    make = KINDS[kind]
    numbers: Any = (np.int64(1), torch.tensor(2), np.int32(3))
    one, two, three = numbers
    scoring, completing = Recorder(scored), Recorder(completed)
    teacher = TeacherClient([URL], transport=httpx.MockTransport(scoring))
    rollout = RolloutClient([URL], transport=httpx.MockTransport(completing))
    support: Any = [[make([7, 8]), make([8, 9])]]
    scores = await teacher.score([(make([4, 5, 6]), one)], top_k=2 * one, support_ids=support)
    assert scoring.bodies == [
        {
            "sequences": [{"token_ids": [4, 5, 6], "prompt_length": 1, "support_ids": [[7, 8], [8, 9]]}],
            "top_k": 2,
            "temperature": 1.0,
        }
    ]
    assert scores.token_ids.tolist() == [5, 6]
    await rollout.generate([make([4, 5])], SAMPLING, two, three)
    await rollout.generate_on(URL, [make([4, 5])], SAMPLING)
    assert [body["prompts"] for body in completing.bodies] == [[[4, 5]], [[4, 5]]]
    assert (completing.bodies[0]["samples_per_prompt"], completing.bodies[0]["student_top_k"]) == (2, 3)


async def test_a_two_dimensional_array_is_a_list_of_prompts_or_of_rows() -> None:
    scoring, completing = Recorder(scored), Recorder(completed)
    prompts: Any = np.array([[1, 2], [3, 4]])
    rows: Any = torch.tensor([[[4, 5], [6, 7]]])
    await RolloutClient([URL], transport=httpx.MockTransport(completing)).generate(prompts, SAMPLING)
    await TeacherClient([URL], transport=httpx.MockTransport(scoring)).score(
        [([1, 2, 3], 1)],
        top_k=1,
        support_ids=rows,
    )
    assert completing.bodies[0]["prompts"] == [[1, 2], [3, 4]]
    assert scoring.bodies[0]["sequences"][0]["support_ids"] == [[4, 5], [6, 7]]


def nothing(request: httpx.Request) -> httpx.Response:
    raise AssertionError(f"{request.url} was asked")


TEACHER_CASES: list[tuple[dict[str, Any], str]] = [
    ({"sequences": []}, r"sequences = \[\] must be a list with at least one"),
    ({"sequences": [([1, 2.0], 1)]}, r"sequences\.0\.token_ids\.1 = 2\.0 must be a whole number"),
    ({"sequences": [([1, 2], 1), ([1, True], 1)]}, r"sequences\.1\.token_ids\.1 = True must be"),
    ({"sequences": [(np.array([1.0, 2.0]), 1)]}, r"sequences\.0\.token_ids\.0 = 1\.0 must be"),
    ({"sequences": [(np.array([True, False]), 1)]}, r"token_ids\.0 = True must be"),
    ({"sequences": [(torch.tensor([[1, 2]]), 1)]}, r"token_ids\.0 = \[1, 2\] must be a whole number"),
    ({"sequences": [(np.int64(3), 1)]}, r"sequences\.0\.token_ids = np.int64\(3\) must be a sequence"),
    ({"sequences": [("12", 1)]}, r"sequences\.0\.token_ids = '12' must be a sequence of token ids"),
    ({"sequences": [(b"12", 1)]}, r"token_ids = b'12' must be a sequence"),
    ({"sequences": [([1, None], 1)]}, r"token_ids\.1 = None must be"),
    ({"sequences": [([1, 2], 1.0)]}, r"sequences\.0\.prompt_length = 1\.0 must be"),
    ({"sequences": [([1, 2], True)]}, r"sequences\.0\.prompt_length = True must be"),
    ({"support_ids": []}, "support_ids is of 0 sequences, sequences of 1"),
    ({"support_ids": [[3]]}, r"sequences\.0\.support_ids\.0 = 3 must be a sequence"),
    ({"support_ids": [[[1, 2.5]]]}, r"sequences\.0\.support_ids\.0\.1 = 2\.5 must be"),
    ({"top_k": 0}, "top_k = 0 must be at least 1"),
    ({"top_k": 2.0}, r"top_k = 2\.0 must be a whole number"),
    ({"temperature": float("nan")}, "temperature = nan must be a finite number"),
    ({"temperature": "1"}, "temperature = '1' must be a finite number"),
    ({"max_rows_per_request": 0}, "max_rows_per_request = 0 must be at least 1"),
]


@pytest.mark.parametrize("kind", [TeacherClient, VllmTeacherClient, BlockingTeacherClient])
@pytest.mark.parametrize(("changes", "message"), TEACHER_CASES)
async def test_what_a_teacher_cannot_be_sent_is_refused_with_its_place(
    changes: dict[str, Any], message: str, kind: Any
) -> None:
    client = kind([URL], transport=httpx.MockTransport(nothing))
    call = {"sequences": [([1, 2], 1)], "top_k": 1, **changes}
    sequences = call.pop("sequences")
    with pytest.raises(InputError, match=message) as caught:
        result = client.score(sequences, **call)
        await result
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)
    if kind is BlockingTeacherClient:
        client.close()


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ({"prompt": SURROGATE, "completion": "b"}, r"sequences\.1\.prompt holds half a surrogate pair at 1"),
        ({"prompt": "a", "completion": SURROGATE}, r"sequences\.1\.completion holds half"),
        ({"messages": [{"role": "user", "content": SURROGATE}]}, r"sequences\.1\.messages\.0\.content holds half"),
        ({"prompt": "a", "completion": b"b"}, r"sequences\.1\.completion = b'b' is a bytes, which JSON cannot spell"),
        ({"prompt": "a", "completion": float("inf")}, r"sequences\.1\.completion = inf must be a finite number"),
        ({"prompt": "a", 3: "b"}, r"sequences\.1 has the key 3"),
        ("text", r"sequences\.1 = 'text' must be a dict"),
        ({"token_ids": [1, 2], "prompt_length": 1, "note": {1}}, r"sequences\.1\.note = \{1\} is a set"),
    ],
)
async def test_a_sequence_that_json_cannot_spell_is_refused_with_its_place(sequence: Any, message: str) -> None:
    client = TeacherClient([URL], transport=httpx.MockTransport(nothing))
    with pytest.raises(InputError, match=message):
        await client.score_sequences([{"prompt": "a", "completion": "b"}, sequence], top_k=1)


async def test_too_deep_a_nesting_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match=r"sequences\.0 is nested too deeply"):
        await TeacherClient([URL], transport=httpx.MockTransport(nothing)).score_sequences(
            [{"messages": deep}], top_k=1
        )


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is empty; give at least one"),
        ([[1], []], r"prompts\.1 is empty; give at least one token id"),
        (np.zeros((2, 0), int), r"prompts\.0 is empty"),
        ([1, 2], r"prompts\.0 = 1 must be a sequence of token ids"),
        ("text", "prompts = 'text' must be a list of sequences"),
        ([[1, 2.0]], r"prompts\.0\.1 = 2\.0 must be a whole number"),
        ([[np.bool_(True)]], r"prompts\.0\.0 = np.True_ must be a whole number"),
        ([torch.tensor([1.0])], r"prompts\.0\.0 = 1\.0 must be"),
        ([torch.tensor([[1, 2]])], r"prompts\.0\.0 = \[1, 2\] must be"),
        ([{1: 2}], r"prompts\.0 = \{1: 2\} must be a sequence"),
    ],
)
async def test_what_a_rollout_server_cannot_be_sent_is_refused_with_its_place(prompts: Any, message: str) -> None:
    client = RolloutClient([URL], transport=httpx.MockTransport(nothing))
    with pytest.raises(InputError, match=message):
        await client.generate(prompts, SAMPLING)
    with pytest.raises(InputError, match=message):
        await client.generate_on(URL, prompts, SAMPLING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt = 0 must be at least 1"),
        ({"samples_per_prompt": 1.0}, r"samples_per_prompt = 1\.0 must be a whole number"),
        ({"student_top_k": -1}, "student_top_k = -1 must be at least 0"),
        ({"student_top_k": True}, "student_top_k = True must be a whole number"),
        (
            {"sampling": SAMPLING.model_copy(update={"temperature": float("inf")})},
            r"sampling\.temperature = inf must be a finite number",
        ),
    ],
)
async def test_options_of_a_rollout_are_checked(options: dict[str, Any], message: str) -> None:
    client = RolloutClient([URL], transport=httpx.MockTransport(nothing))
    with pytest.raises(InputError, match=message):
        await client.generate(**{"prompts": [[1]], "sampling": SAMPLING, **options})


@pytest.mark.parametrize("length", [0, 2, None])
async def test_a_plain_vllm_server_is_asked_for_no_sequence_without_a_row(length: int | None) -> None:
    client = VllmTeacherClient([URL], transport=httpx.MockTransport(nothing))
    with pytest.raises(InputError, match=rf"sequences\.0: prompt_length = {length} of 2 token ids must leave one"):
        await client.score_sequences([{"token_ids": [1, 2], "prompt_length": length}], top_k=1)


async def test_a_closed_client_says_so() -> None:
    transport = httpx.MockTransport(nothing)
    for client in (TeacherClient([URL], transport=transport), VllmTeacherClient([URL], transport=transport)):
        await client.close()
        for asking in (client.info(), client.score([([1, 2], 1)], top_k=1), client.wait_ready(1.0)):
            with pytest.raises(ClientClosedError, match=f"TeacherClient of {URL} is closed"):
                await asking
    rollout = RolloutClient([URL], transport=transport)
    await rollout.close()
    for call in (rollout.info(), rollout.generate([[1]], SAMPLING), rollout.generate_on(URL, [[1]], SAMPLING)):
        with pytest.raises(ClientClosedError, match=f"RolloutClient of {URL} is closed"):
            await call


def test_a_closed_blocking_client_says_so() -> None:
    client = BlockingTeacherClient([URL], transport=httpx.MockTransport(nothing))
    client.close()
    client.close()
    for call in (client.info, client.vocabulary, lambda: client.score([([1, 2], 1)], top_k=1)):
        with pytest.raises(ClientClosedError, match=f"the BlockingTeacherClient of {URL} is closed"):
            call()


async def test_a_closed_weight_control_client_says_so() -> None:
    client = control(nothing, [URL])
    await client.close()
    for call in (client.start, client.resume, lambda: client.pause(1.0), lambda: client.finish("1.1@r1")):
        with pytest.raises(ClientClosedError, match=f"the weight control client of {URL} is closed") as caught:
            await call()
        assert isinstance(caught.value, DistillServeError)
