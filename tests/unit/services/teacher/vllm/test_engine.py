"""The teacher's vLLM engine over a fake AsyncLLM: how its answers become rows, what it refuses, how it ends."""

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from services.config import TeacherConfig
from services.config.passed_on import _RESERVED_TEACHER_ENGINE_ARGS
from services.errors import DistillServeError, RequestError, StartupError
from services.http.metrics import TeacherMetrics
from services.teacher.jobs import EncodedSequence, ScoreJob
from services.teacher.vllm import engine as engine_vllm
from tests.teacher_app import GOOD, score, serving

VOCAB = 261
HALF, QUARTER, EIGHTH = math.log(1 / 2), math.log(1 / 4), math.log(1 / 8)


def flat(*positions: list[tuple[int, float]]) -> FlatLogprobs:
    """vLLM's prompt logprobs: nothing for the first token, then (id, logprob) of the token itself and of the top-k."""
    logprobs = FlatLogprobs()
    logprobs.append(None)
    for entries in positions:
        ids, values = zip(*entries, strict=True)
        logprobs.append_fast(list(ids), list(values), iter(range(len(ids))), [None] * len(ids))
    return logprobs


def answer(logprobs: FlatLogprobs | None, support: np.ndarray | None = None, reason: str = "length") -> Any:
    completion = SimpleNamespace(finish_reason=reason)
    return SimpleNamespace(
        finished=True, prompt_logprobs=logprobs, prompt_token_id_logprobs=support, outputs=[completion]
    )


class FakeEngine:
    """AsyncLLM as far as it is used; every position's token has logprob -its id, and the top-k are 0, 1, 2, ..."""

    def __init__(self, *, v2: bool = False, max_model_len: int = 257) -> None:
        model = SimpleNamespace(get_vocab_size=lambda: VOCAB, max_model_len=max_model_len)
        self.vllm_config = SimpleNamespace(model_config=model, use_v2_model_runner=v2)
        self.errored, self.is_shut_down = False, False
        self.free, self.entered = threading.Event(), threading.Semaphore(0)
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.aborted: list[list[int]] = []
        self.fails: Exception | None = None

    async def generate(
        self, prompt: dict[str, list[int]], params: SamplingParams, request_id: str
    ) -> AsyncIterator[Any]:
        ids = prompt["prompt_token_ids"]
        self.asked.append((ids, params))
        self.entered.release()
        try:
            while not self.free.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.aborted.append(ids)
            raise
        if self.fails is not None:
            raise self.fails
        top = [(k, -1.0 - k) for k in range(params.prompt_logprobs or 0)]
        yield answer(flat(*([(token, -float(token)), *top] for token in ids[1:])))

    def shutdown(self) -> None:
        self.is_shut_down = True


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What loading sets in the environment does not outlive a test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def folder(tiny_model_folder: Callable[[str], str]) -> str:
    return tiny_model_folder("llama")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(engine_vllm, "start_vllm", lambda config: engine)
    monkeypatch.setattr(engine_vllm, "_POLL_S", 0.01)
    return engine


@contextmanager
def scoring(folder: str, **options: Any) -> Iterator[tuple[engine_vllm.VllmScorer, list[Exception]]]:
    failures: list[Exception] = []
    config = TeacherConfig(model=folder, engine="vllm", **options)
    scorer = engine_vllm.VllmScorer(config, TeacherMetrics(), failures.append)
    try:
        yield scorer, failures
    finally:
        scorer.close()


def job(*token_ids: list[int], prompt_length: int = 1, top_k: int = 2) -> ScoreJob:
    return ScoreJob([EncodedSequence(ids, prompt_length) for ids in token_ids], top_k=top_k, temperature=1.0)


def written(work: ScoreJob, output: Any, vocab: int = 4) -> ScoreJob:
    (item,) = work.items()
    engine_vllm.write_rows(item, output, vocab)
    return work


# ------------------------------------------------------------------------------------- answers to rows


def test_rows_are_those_of_the_completion_the_token_itself_first() -> None:
    prompt = [(9, -7.0), (9, -7.0), (9, -7.0)]  # of the prompt's second token: not ours
    first = [(3, EIGHTH), (1, HALF), (0, QUARTER)]
    second = [(1, HALF), (1, HALF), (0, QUARTER)]  # a token that is in the top-k comes twice
    work = written(job([5, 6, 3, 1], prompt_length=2), answer(flat(prompt, first, second)))
    columns = work.columns
    np.testing.assert_allclose(columns.token_logprobs, [EIGHTH, HALF])
    assert columns.topk_ids.tolist() == [[1, 0], [1, 0]] and columns.topk_ids.dtype == np.int32
    np.testing.assert_allclose(columns.topk_logprobs, [[HALF, QUARTER]] * 2)
    np.testing.assert_allclose(columns.tail_logprobs, [QUARTER] * 2)  # 1 - 1/2 - 1/4
    assert np.isnan(columns.entropies).all() and columns.support_logprobs is None


def test_equal_logprobs_are_ordered_by_id() -> None:
    work = written(job([5, 6], top_k=3), answer(flat([(6, -9.0), (2, HALF), (3, EIGHTH), (1, EIGHTH)])), vocab=9)
    assert work.columns.topk_ids.tolist() == [[2, 1, 3]]


def test_a_tail_below_rounding_has_a_floor_and_none_at_all_is_none() -> None:
    certain = [(1, 0.0), (1, 0.0)]
    assert written(job([5, 1], top_k=1), answer(flat(certain))).columns.tail_logprobs[0] == np.float32(math.log(1e-6))
    assert written(job([5, 1], top_k=1), answer(flat(certain)), vocab=1).columns.tail_logprobs[0] == -np.inf


def test_support_is_scored_and_a_token_named_twice_counts_once() -> None:
    sequence = EncodedSequence([5, 6, 1], 2, [[0, 3, 0]])
    work = ScoreJob([sequence], top_k=1, temperature=1.0)
    support = np.array([[QUARTER, EIGHTH, QUARTER]], np.float32)
    written(work, answer(flat([(6, -9.0), (1, HALF)], [(1, HALF), (1, HALF)]), support))
    np.testing.assert_allclose(work.columns.support_logprobs, support)
    np.testing.assert_allclose(work.columns.support_tail_logprobs, [math.log(1 - 1 / 4 - 1 / 8)])
    parameters = engine_vllm.sampling_params(work.items()[0])
    assert parameters.prompt_logprob_token_ids.tolist() == [[0, 3, 0]] and parameters.prompt_logprob_start == 1
    with pytest.raises(DistillServeError, match="support_ids at every row"):
        written(work, answer(flat([(6, -9.0), (1, HALF)], [(1, HALF), (1, HALF)]), None))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (answer(None), "logprobs of every token"),
        (answer(flat()), "logprobs of every token"),
        (answer(flat([(6, math.nan), (0, math.nan), (1, math.nan)])), "logits are not finite"),
        (answer(flat([(6, HALF), (6, HALF), (1, QUARTER)]), reason="abort"), "takes no more requests"),
    ],
)
def test_an_answer_that_is_no_answer_is_an_error(output: Any, message: str) -> None:
    with pytest.raises(DistillServeError, match=message):
        written(job([5, 6]), output)


def test_vllm_is_asked_for_no_more_than_is_needed() -> None:
    parameters = engine_vllm.sampling_params(job([5, 6], top_k=7).items()[0])
    assert (parameters.prompt_logprobs, parameters.max_tokens, parameters.flat_logprobs) == (7, 1, True)
    assert parameters.logprobs is None and not parameters.detokenize
    assert parameters.skip_reading_prefix_cache  # or the rows of a cached prefix would be missing


# ------------------------------------------------------------------------------------- jobs


def test_sequences_of_a_job_find_their_rows(fake: FakeEngine, folder: str) -> None:
    fake.free.set()
    with scoring(folder) as (scorer, _):
        works = [job([9, 8, 7], [9, 6]), job([9, 5, 4, 3], prompt_length=2, top_k=1)]
        for work in works:
            scorer.submit(work)
        first, second = (work.done.result(5) for work in works)
    assert first.token_logprobs.tolist() == [-8, -7, -6] and first.row_offsets.tolist() == [0, 2, 3]
    assert first.topk_ids.tolist() == [[0, 1]] * 3
    assert second.token_logprobs.tolist() == [-4, -3]
    assert fake.is_shut_down and not scorer._thread.is_alive()


def test_a_cancelled_job_aborts_its_requests(fake: FakeEngine, folder: str) -> None:
    with scoring(folder) as (scorer, failures):
        leaving, staying = job([9, 8], [9, 7]), job([9, 6])
        for work in (leaving, staying):
            scorer.submit(work)
        for _ in range(3):
            fake.entered.acquire()
        leaving.done.cancel()
        while len(fake.aborted) < 2:
            time.sleep(0.005)
        fake.free.set()
        assert staying.done.result(5).token_logprobs.tolist() == [-6]
    assert sorted(fake.aborted) == [[9, 7], [9, 8]] and failures == []


def test_one_sequence_that_fails_fails_its_job_alone(fake: FakeEngine, folder: str) -> None:
    with scoring(folder) as (scorer, failures):
        fake.fails = IndexError("a bug")
        fake.free.set()
        scorer.submit(bad := job([9, 8], [9, 7]))
        with pytest.raises(IndexError):
            bad.done.result(5)
        fake.fails = None
        scorer.submit(good := job([9, 6]))
        assert good.done.result(5).token_logprobs.tolist() == [-6]
    assert failures == []


@pytest.mark.parametrize("idle", [True, False])
def test_a_dead_engine_is_noticed_and_fails_who_waits_at_once(idle: bool, fake: FakeEngine, folder: str) -> None:
    with scoring(folder) as (scorer, failures):
        works = [] if idle else [job([9, 8]), job([9, 7])]
        for work in works:
            scorer.submit(work)
            fake.entered.acquire()
        fake.errored = True  # nobody is told
        while not failures:
            time.sleep(0.005)
        scorer.submit(late := job([9, 6]))
        for work in [*works, late]:
            with pytest.raises(RequestError) as refusal:
                work.done.result(5)
            assert refusal.value.status == 503
    assert [type(error) for error in failures] == [EngineDeadError]
    assert len(fake.aborted) == len(works)


def test_an_answer_that_the_engine_is_dead_is_believed(fake: FakeEngine, folder: str) -> None:
    with scoring(folder) as (scorer, failures):
        fake.fails = EngineDeadError()
        fake.free.set()
        scorer.submit(work := job([9, 8]))
        with pytest.raises(RequestError, match="EngineDeadError"):
            work.done.result(5)
    assert failures == [fake.fails]


def test_what_is_under_way_at_the_end_is_told(fake: FakeEngine, folder: str) -> None:
    with scoring(folder) as (scorer, _):
        scorer.submit(work := job([9, 8]))
        fake.entered.acquire()
    with pytest.raises(RequestError, match="takes no more requests"):
        work.done.result(0)
    assert fake.aborted == [[9, 8]]


def test_the_backlog_is_what_waits_at_the_speed_seen(fake: FakeEngine, folder: str) -> None:
    with scoring(folder) as (scorer, _):
        assert scorer.backlog_s() == 0.0
        fake.free.set()
        scorer.submit(work := job([9] * 10))
        work.done.result(5)
        fake.free.clear()
        scorer.submit(waiting := job([9] * 10))
        fake.entered.acquire()
        fake.entered.acquire()
        assert scorer.backlog_s() > 0.0
        waiting.done.cancel()


# ------------------------------------------------------------------------------------- start, service


def test_it_says_what_it_cannot_do(fake: FakeEngine, folder: str) -> None:
    with scoring(folder, max_top_k=9) as (scorer, _):
        info = scorer.info
    assert (info.engine, info.temperature_support, info.scores_support_ids) == ("vllm", "one", False)
    assert not info.computes_entropies
    assert (info.max_model_len, info.max_top_k, info.padded_vocab_size) == (256, 9, VOCAB)
    assert info.eos_token_ids == [256]


def test_replicas_have_one_fingerprint_and_other_weights_another(
    fake: FakeEngine, folder: str, tiny_model_folder: Callable[[str], str]
) -> None:
    prints = []
    for model, options in (
        (folder, {}),
        (folder, {}),
        (folder, {"dtype": "bfloat16"}),
        (tiny_model_folder("qwen3"), {}),
    ):
        with scoring(model, **options) as (scorer, _):
            prints.append(scorer.info.fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_options_become_arguments_and_the_users_own_win(folder: str) -> None:
    config = TeacherConfig(
        model=folder, engine="vllm", max_model_len=64, tensor_parallel_size=2, engine_args={"shutdown_timeout": 1}
    )
    arguments = engine_vllm.engine_arguments(config)
    assert arguments["max_model_len"] == 65  # room for the token that vLLM samples
    assert (arguments["tensor_parallel_size"], arguments["shutdown_timeout"]) == (2, 1)
    assert engine_vllm.engine_arguments(config.model_copy(update={"max_model_len": 999}))["max_model_len"] == 256
    engine_vllm.AsyncEngineArgs(**arguments)


def test_weights_are_read_from_safetensors_unless_told_otherwise(folder: str) -> None:
    config = TeacherConfig(model=folder, engine="vllm")
    assert engine_vllm.engine_arguments(config)["load_format"] == "safetensors"
    told = config.model_copy(update={"engine_args": {"load_format": "runai_streamer"}})
    assert engine_vllm.engine_arguments(told)["load_format"] == "runai_streamer"


def test_what_is_reserved_is_what_vllm_has() -> None:
    assert set(_RESERVED_TEACHER_ENGINE_ARGS) <= set(engine_vllm.AsyncEngineArgs.__dataclass_fields__)


@pytest.mark.parametrize("theirs", [{}, {"a": 1}, {"head_dtype": "model"}])
def test_a_half_precision_head_is_float32_on_a_gpu_unless_it_may_be_quantised(
    theirs: dict[str, Any], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def overrides(**changes: Any) -> Any:
        arguments = {"hf_overrides": theirs} if theirs else {}
        section = {"model": folder, "dtype": "bfloat16", "engine": "vllm"} | changes
        config = TeacherConfig(**section | {"engine_args": arguments | section.get("engine_args", {})})
        return engine_vllm.engine_arguments(config).get("hf_overrides", {})

    assert overrides() == {"head_dtype": "float32"} | theirs
    assert overrides(dtype="float32") == theirs
    assert overrides(engine_args={"quantization": "fp8"}) == theirs
    quantised = tmp_path / "quantised"
    shutil.copytree(folder, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert overrides(model=str(quantised)) == theirs
    assert overrides(float32_head=False) == theirs
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert overrides() == theirs
    assert overrides(float32_head=True) == {"head_dtype": "float32"} | theirs


def test_a_gpu_of_its_own_is_taken_as_vllm_takes_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(**options: Any) -> tuple[float, int | None]:
        arguments = engine_vllm.engine_arguments(TeacherConfig(model=folder, engine="vllm", **options))
        return arguments["gpu_memory_utilization"], arguments["kv_cache_memory_bytes"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sizes() == (0.9, None)
    assert sizes(gpu_memory_utilization=0.2, kv_cache_gib=0.5) == (0.2, 1 << 29)  # as on a shared one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sizes() == (0.9, 1 << 30)


def test_an_argument_that_vllm_does_not_have_is_refused(folder: str) -> None:
    config = TeacherConfig(model=folder, engine="vllm", engine_args={"quantisation": "fp8"})
    with pytest.raises(StartupError, match=r"engine_args\.quantisation is no field.*did you mean quantization"):
        engine_vllm.engine_arguments(config)


def test_what_vllm_refuses_is_one_line(folder: str) -> None:
    config = TeacherConfig(model=folder, engine="vllm", engine_args={"quantization": "no-such"})
    with pytest.raises(StartupError, match=r"vLLM refuses teacher\.model = .*no-such") as refusal:
        engine_vllm.start_vllm(config)
    assert "\n" not in str(refusal.value)


async def test_the_api_serves_it_and_refuses_what_it_cannot_do(fake: FakeEngine, folder: str) -> None:
    fake.free.set()
    async with serving(folder, engine="vllm") as client:
        good = await score(client, {"sequences": [GOOD], "top_k": 1})
        warm = await score(client, {"sequences": [GOOD], "top_k": 1, "temperature": 2.0})
        chosen = await score(client, {"sequences": [{**GOOD, "support_ids": [[1]]}], "top_k": 1})
    assert good.json()["sequences"][0]["entropies"] == [None] and good.json()["sequences"][0]["token_logprobs"] == [-6]
    for refused, field in ((warm, "temperature"), (chosen, "sequences.0.support_ids")):
        assert (refused.status_code, refused.json()["field"]) == (422, field)
        assert "(teacher.engine = vllm)" in refused.json()["detail"]


async def test_a_dead_engine_takes_the_service_down(fake: FakeEngine, folder: str) -> None:
    failures: list[Exception] = []
    async with serving(folder, engine="vllm") as client:
        client.service.on_failure = failures.append
        waiting = asyncio.create_task(score(client, {"sequences": [GOOD], "top_k": 1}))
        while not fake.asked:
            await asyncio.sleep(0.005)
        fake.errored = True
        assert (await waiting).status_code == 503
        for path in ("/health", "/ready"):
            assert (await client.get(path)).json()["title"] == "Engine failed"
    assert [type(error) for error in failures] == [EngineDeadError]


async def test_an_engine_that_ends_while_the_server_drains_is_no_failure(fake: FakeEngine, folder: str) -> None:
    """A signal to the whole process group ends vLLM's processes too."""
    async with serving(folder, engine="vllm") as client:
        service = client.service
        service.draining = True
        fake.errored = True
        while not service.scorer._closed:
            await asyncio.sleep(0.005)
        assert service.failure is None


async def test_an_engine_that_is_ready_too_late_is_closed(
    fake: FakeEngine, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, late = threading.Event(), threading.Event()

    def start(config: TeacherConfig) -> FakeEngine:
        begun.set()
        late.wait()
        return fake

    monkeypatch.setattr(engine_vllm, "start_vllm", start)
    async with serving(folder, engine="vllm", wait=False) as client:
        await asyncio.to_thread(begun.wait)
    late.set()
    while not fake.is_shut_down:
        await asyncio.sleep(0.005)
    assert client.service.scorer is None


def test_the_transformers_engine_does_without_vllm() -> None:
    code = "import sys, services.teacher.server; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
