"""A plain vLLM server as a teacher: its JSON becomes our arrays, and what it cannot do is not asked of it."""

import json
import math
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from services.clients.plain_vllm import TeacherTokens, VllmTeacherClient
from services.clients.teacher import RefusedSequenceError
from services.errors import PeerError, ProblemError

VOCAB = 5
# Of a model that ignores what comes before: 1/2, 1/4, 1/8, 1/16 and nothing for the last one.
LOGPROBS = [math.log(p) for p in (1 / 2, 1 / 4, 1 / 8, 1 / 16)] + [-9999.0]


class Vllm:
    """The routes of `vllm serve` that are used, with its limit on prompt logprobs."""

    def __init__(self, max_logprobs: int = 20) -> None:
        self.max_logprobs = max_logprobs
        self.asked: list[dict[str, Any]] = []
        self.change = lambda answer: answer
        self.refuse: Callable[[list[list[int]]], str | None] = lambda prompts: None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(200)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json=self.change({"data": [{"id": "big", "max_model_len": 33, "root": "/big"}]}))
        assert request.url.path == "/v1/completions"
        body = json.loads(request.content)
        self.asked.append(body)
        if (message := self.refuse(body["prompt"])) is not None:
            return httpx.Response(400, json={"error": {"message": message, "code": 400}})
        width = VOCAB if body["prompt_logprobs"] == -1 else body["prompt_logprobs"]
        if width > self.max_logprobs:
            message = f"Requested prompt logprobs of {width}, which is greater than max allowed: {self.max_logprobs}"
            return httpx.Response(400, json={"error": {"message": message, "type": "BadRequestError", "code": 400}})
        choices = [
            {"index": i, "text": "", "prompt_logprobs": [None, *(self.row(token, width) for token in prompt[1:])]}
            for i, prompt in enumerate(body["prompt"])
        ]
        return httpx.Response(200, json=self.change({"choices": choices[::-1]}))

    def row(self, token: int, width: int) -> dict[str, Any]:
        shown = dict.fromkeys([token, *range(width)])
        return {str(i): {"logprob": LOGPROBS[i], "rank": i + 1, "decoded_token": "x"} for i in shown}


def client(*servers: Vllm, tokens: TeacherTokens | None = None, outage_s: float = 300.0) -> VllmTeacherClient:
    hosts = {f"server-{index}": server for index, server in enumerate(servers)}
    transport = httpx.MockTransport(lambda request: hosts[request.url.host](request))
    urls = [f"http://{host}" for host in hosts]
    return VllmTeacherClient(urls, tokens=tokens, transport=transport, attempts=1, outage_s=outage_s)


@pytest.mark.parametrize(("allowed", "limit"), [(20, VOCAB), (3, 3)])
async def test_info_is_what_the_server_lets_one_find_out(allowed: int, limit: int) -> None:
    (info,) = await client(Vllm(allowed)).info()
    assert (info.model, info.padded_vocab_size, info.max_top_k, info.max_model_len) == ("big", VOCAB, limit, 32)
    assert (info.temperature_support, info.scores_support_ids, info.computes_entropies) == ("one", False, False)
    assert info.server == "vllm"
    assert info.tokenizer_fingerprint is None


async def test_what_is_known_of_the_tokenizer_is_passed_on() -> None:
    asking = client(Vllm(), tokens=TeacherTokens("print", [4], "probe", {"a": 0}))
    (info,) = await asking.info()
    assert (info.tokenizer_fingerprint, info.eos_token_ids, info.chat_template_probe) == ("print", [4], "probe")
    assert await asking.vocabulary() == {"a": 0}
    with pytest.raises(PeerError, match="does not tell its vocabulary"):
        await client(Vllm()).vocabulary()


async def test_rows_are_those_of_the_completion_in_the_order_asked() -> None:
    scores = await client(Vllm()).score([([0, 1, 3, 0], 2), ([0, 4], 1)], top_k=2)
    assert scores.row_offsets.tolist() == [0, 2, 3]
    np.testing.assert_allclose(scores.token_logprobs, [math.log(1 / 16), math.log(1 / 2), -np.inf])
    assert scores.topk_ids.tolist() == [[0, 1]] * 3
    np.testing.assert_allclose(scores.topk_logprobs, [LOGPROBS[:2]] * 3, rtol=1e-6)
    np.testing.assert_allclose(scores.tail_logprobs, [math.log(1 / 4)] * 3, rtol=1e-6)
    assert np.isnan(scores.entropies).all()
    assert {a.dtype.name for a in scores.columns().values()} == {"float32", "int32"}


async def test_the_whole_vocabulary_leaves_no_tail() -> None:
    scores = await client(Vllm()).score([([0, 1], 1)], top_k=VOCAB)
    assert scores.topk_ids.tolist() == [[0, 1, 2, 3, 4]] and scores.tail_logprobs.tolist() == [-np.inf]


async def test_a_request_asks_for_nothing_else() -> None:
    server = Vllm()
    await client(server).score([([0, 1], 1)], top_k=2)
    assert server.asked[-1] == {
        "model": "big",
        "prompt": [[0, 1]],
        "prompt_logprobs": 2,
        "max_tokens": 1,
        "temperature": 0.0,
    }


async def test_work_is_spread_over_the_servers() -> None:
    servers = Vllm(), Vllm()
    scores = await client(*servers).score([([0, i], 1) for i in (0, 1, 2, 3)], top_k=1)
    np.testing.assert_allclose(scores.token_logprobs, LOGPROBS[:4], rtol=1e-6)
    assert [server.asked[-1]["prompt"] for server in servers] == [[[0, 0], [0, 1]], [[0, 2], [0, 3]]]


@pytest.mark.parametrize(
    ("options", "message"), [({"temperature": 2.0}, r"temperature = 2\.0"), ({"support_ids": [[[1]]]}, "support_ids")]
)
async def test_what_it_cannot_do_is_not_asked(options: dict[str, Any], message: str) -> None:
    server = Vllm()
    with pytest.raises(PeerError, match=f"{message} cannot be asked of http://server-0"):
        await client(server).score([([0, 1], 1)], top_k=1, **options)
    assert server.asked == []


@pytest.mark.parametrize("bad", [(), (0,), (5,), (1, 2), (0, 3, 6), tuple(range(7))])
async def test_a_sequence_that_vllm_refuses_is_found_by_cutting_in_halves(bad: tuple[int, ...]) -> None:
    """vLLM refuses the whole request and names nothing."""
    server = Vllm()
    server.refuse = lambda prompts: "Token id 99 is out of vocabulary" if any(99 in p for p in prompts) else None
    sequences = [([0, 99 if i in bad else i % 4], 1) for i in range(7)]
    told: dict[int, str] = {}
    scores = await client(server).score(
        sequences, top_k=1, on_refused=lambda index, error: told.update({index: error.reason})
    )
    assert told.keys() == set(bad) and all("out of vocabulary" in reason for reason in told.values())
    assert scores.token_ids.tolist() == [i % 4 for i in range(7) if i not in bad]
    assert np.diff(scores.row_offsets).tolist() == [int(i not in bad) for i in range(7)]
    if bad:
        with pytest.raises(RefusedSequenceError) as caught:
            await client(server).score(sequences, top_k=1)
        assert caught.value.index == min(bad)


async def test_a_top_k_that_is_too_large_is_no_refused_sequence() -> None:
    server = Vllm(3)
    told: list[int] = []
    with pytest.raises(ProblemError, match="greater than max allowed: 3"):
        await client(server).score([([0, 1], 1)] * 4, top_k=4, on_refused=lambda index, _: told.append(index))
    assert told == []


@pytest.mark.parametrize(
    ("sequence", "options", "message"),
    [
        ({"prompt": "a", "completion": "b"}, {}, "sequences.0, a text,"),
        ({"token_ids": [0, 1], "prompt_length": 1}, {"logprob_dtype": "float16"}, "logprob_dtype = float16"),
    ],
)
async def test_texts_and_half_precision_are_not_asked(sequence: Any, options: Any, message: str) -> None:
    server = Vllm()
    with pytest.raises(PeerError, match=f"{message} cannot be asked of http://server-0"):
        await client(server).score_sequences([sequence], top_k=1, **options)
    assert server.asked == []


@pytest.mark.parametrize("texts", [[("a", "b")], [("", "")], [("a", "b"), ("c", "d")]])
async def test_texts_are_refused_with_their_place_and_nothing_is_asked(texts: list[tuple[str, str]]) -> None:
    server = Vllm()
    with pytest.raises(PeerError, match=r"^sequences\.\d, a text, cannot be asked of http://server-0"):
        await client(server).score_text(texts, top_k=1)
    assert server.asked == []


async def test_an_outage_before_the_first_answer_is_sat_out_like_any_other(waits: list[float]) -> None:
    """The server's limits are asked for first, by a request that is waited for no less than the scores themselves."""
    server = Vllm()
    answers = iter([503] * 9)

    def starting(request: httpx.Request) -> httpx.Response:
        status = next(answers, None)
        return server(request) if status is None else httpx.Response(status)

    asking = VllmTeacherClient(["http://a"], transport=httpx.MockTransport(starting), attempts=1)
    assert (await asking.score([([0, 1], 1)], top_k=1)).token_ids.tolist() == [1]
    assert len(waits) == 9


async def test_a_top_k_above_the_servers_limit_is_refused_in_its_words() -> None:
    with pytest.raises(ProblemError, match="greater than max allowed: 3"):
        await client(Vllm(3)).score([([0, 1], 1)], top_k=4)


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: [],
        lambda answer: {"choices": [{"index": 0}]},
        lambda answer: {"choices": [{"index": 0, "prompt_logprobs": [None]}]},
        lambda answer: {"choices": [{"index": 0, "prompt_logprobs": [None, {"x": {"logprob": 0}}]}]},
        lambda answer: {"choices": [{"index": 0, "prompt_logprobs": [None, {"1": {}}]}]},
        lambda answer: {"choices": [{"index": 0, "prompt_logprobs": [None, {"0": {"logprob": 0.0}}]}]},
    ],
)
async def test_another_answer_is_a_peer_error(change: Any) -> None:
    server = Vllm()
    asking = client(server, outage_s=0.0)
    await asking.info()
    server.change = change
    with pytest.raises(PeerError, match="http://server-0"):
        await asking.score([([0, 1], 1)], top_k=1)


@pytest.mark.parametrize(
    "spoilt",
    [None, {"1": {"logprob": None}, "0": {"logprob": -0.1}}],
    ids=["null row", "null logprob"],
)
async def test_a_row_that_is_no_number_costs_its_own_sequence_alone(spoilt: Any) -> None:
    server = Vllm()
    asking = client(server)
    good = await asking.score([([0, 1], 1), ([0, 2], 1)], top_k=1)

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        next(c for c in answer["choices"] if c["index"] == 0)["prompt_logprobs"][1] = spoilt
        return answer

    server.change = change
    scores = await asking.score([([0, 1], 1), ([0, 2], 1)], top_k=1, max_rows_per_request=2)
    assert math.isnan(scores.token_logprobs[0]) and scores.token_logprobs[1] == good.token_logprobs[1]
    assert scores.topk_logprobs.shape == (2, 1) and scores.topk_ids[1].tolist() == good.topk_ids[1].tolist()


async def test_a_server_of_another_kind_is_told_apart() -> None:
    server = Vllm()
    server.change = lambda answer: {"title": "Not found"}
    with pytest.raises(
        PeerError, match=r"/v1/models answered with what is no list of models as of vLLM; see teacher_client\.protocol"
    ):
        await client(server).info()


async def test_readiness_is_vllms_health() -> None:
    await client(Vllm()).wait_ready(1.0)
