"""The client for programs without an event loop, against a real application and against one that never answers."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest

from services.clients import BlockingTeacherClient, TeacherClient
from services.config import TeacherConfig
from services.errors import PeerError, ProblemError
from services.teacher.server import create_app
from services.teacher.transformers.batcher import Batcher
from services.teacher.transformers.engine import TransformersEngine
from services.wire.teacher import TeacherScores

URL = "http://teacher"


@pytest.fixture(scope="module")
def engine(tiny_model_folder: Callable[[str], str]) -> TransformersEngine:
    return TransformersEngine(TeacherConfig(model=tiny_model_folder("qwen3"), device="cpu"))


@pytest.fixture(scope="module")
def app(engine: TransformersEngine) -> Iterator[httpx.AsyncBaseTransport]:
    app = create_app(engine._config)
    service = app.state.service
    service.scorer = Batcher(engine, 4096, service.metrics, lambda error: None)
    yield httpx.ASGITransport(app)
    service.close()


@pytest.fixture
def client(app: httpx.AsyncBaseTransport) -> Iterator[BlockingTeacherClient]:
    with BlockingTeacherClient([URL], transport=app) as client:
        yield client


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def assert_equal(ours: TeacherScores, theirs: TeacherScores) -> None:
    assert ours.metadata() == theirs.metadata() and ours.columns().keys() == theirs.columns().keys()
    for name, column in ours.columns().items():
        np.testing.assert_allclose(column, theirs.columns()[name], atol=1e-5, err_msg=name)


def test_texts_are_scored_as_the_token_ids_they_become(client: BlockingTeacherClient) -> None:
    texts = client.score_text([("2+2=", "4"), ("a", "bcd")], top_k=3, temperature=0.5)
    ids = client.score([(list(b"2+2=4"), 4), (list(b"abcd"), 1)], top_k=3, temperature=0.5)
    assert texts.token_ids.tolist() == list(b"4bcd") and texts.row_offsets.tolist() == [0, 1, 4]
    assert_equal(texts, ids)


def test_a_refused_sequence_is_told_and_the_others_are_scored(client: BlockingTeacherClient) -> None:
    told: dict[int, str] = {}
    asked = [(list(b"2+2=4"), 4), ([5, 1 << 20], 1), (list(b"abcd"), 1)]
    scores = client.score(asked, top_k=3, on_refused=lambda index, error: told.update({index: error.reason}))
    assert told.keys() == {1} and str(1 << 20) in told[1] and "sequences" not in told[1]
    assert scores.token_ids.tolist() == list(b"4bcd") and scores.row_offsets.tolist() == [0, 1, 1, 4]


def test_all_forms_of_a_sequence_may_be_mixed(client: BlockingTeacherClient) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    asked: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "bcd"},
        {"token_ids": [5, 6], "prompt_length": 1},
        {"messages": messages},
    ]
    whole = client.score_sequences(asked, top_k=2)
    cut = client.score_sequences(asked, top_k=2, max_rows_per_request=1)
    half = client.score_sequences(asked, top_k=2, logprob_dtype="float16")
    assert whole.token_ids.tolist() == [*b"bcd", 6, *b"yo", 256]
    assert_equal(whole, cut)
    assert half.topk_logprobs.dtype == np.float16


def test_it_says_what_the_other_client_says(client: BlockingTeacherClient, app: httpx.AsyncBaseTransport) -> None:
    async def ask() -> tuple[object, ...]:
        async with TeacherClient([URL], transport=app) as other:
            return await other.info(), await other.vocabulary()

    client.wait_ready(5.0)
    assert (client.info(), client.vocabulary()) == asyncio.run(ask())


def test_errors_arrive_as_they_are(client: BlockingTeacherClient) -> None:
    with pytest.raises(ProblemError, match=r"answered 422: sequences\.0\.token_ids holds id 9999"):
        client.score([([1, 9999], 1)], top_k=1)


def test_several_threads_may_share_it(client: BlockingTeacherClient) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: client.score([([9, i], 1)], top_k=1).token_ids.tolist(), range(40)))
    assert found == [[i] for i in range(40)]


def test_closing_ends_its_thread_and_may_be_repeated(app: httpx.AsyncBaseTransport) -> None:
    client = BlockingTeacherClient([URL], transport=app)
    client.info()
    assert "teacher-client" in threads()
    client.close()
    client.close()
    assert "teacher-client" not in threads()
    with pytest.raises(RuntimeError):
        client.info()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, PeerError])
def test_an_exception_cancels_what_is_under_way(interruption: type[BaseException]) -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def never(request: httpx.Request) -> httpx.Response:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    client = BlockingTeacherClient([URL], transport=httpx.MockTransport(never))
    with ThreadPoolExecutor(1) as pool, pytest.raises(interruption), client:
        pool.submit(client.info)
        assert started.wait(10)
        raise interruption
    assert cancelled.is_set() and "teacher-client" not in threads()


def test_an_interrupted_call_does_not_go_on_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a call waits, and the program goes on with the client."""
    started, cancelled = threading.Event(), threading.Event()

    async def never(request: httpx.Request) -> httpx.Response:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    class Interrupted:
        def __init__(self, future: Any) -> None:
            self.future = future

        def result(self) -> None:
            assert started.wait(10)
            raise KeyboardInterrupt

        def cancel(self) -> None:
            self.future.cancel()

    with BlockingTeacherClient([URL], transport=httpx.MockTransport(never)) as client:
        start = client._portal.start_task_soon
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(client._portal, "start_task_soon", lambda work: Interrupted(start(work)))
            client.info()
        assert cancelled.wait(10)


def test_the_example_of_its_docstring_runs(app: httpx.AsyncBaseTransport, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.strip() for line in (BlockingTeacherClient.__doc__ or "").splitlines()]
    code = "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... "))).replace("  # doctest: +SKIP", "")
    exec(code, {"BlockingTeacherClient": partial(BlockingTeacherClient, transport=app)})
    assert capsys.readouterr().out.startswith("[49 51 50] -")
