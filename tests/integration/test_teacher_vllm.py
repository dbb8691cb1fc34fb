"""vLLM as a teacher, for real: inside our server, and plain behind its OpenAI API."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from services.clients import TeacherClient
from services.clients.plain_vllm import VllmTeacherClient
from services.config import TeacherConfig
from services.teacher.jobs import EncodedSequence
from services.teacher.transformers.engine import TransformersEngine
from services.wire.teacher import TeacherInfo, TeacherScores
from tests.integration.processes import KEY, Server, plain_vllm, server
from tests.scoring import score_alone

pytestmark = pytest.mark.integration

GOOD = {"token_ids": [5, 6, 7], "prompt_length": 1}


@pytest.fixture
def teacher(models: dict[str, str], tmp_path: Path) -> Iterator[Server]:
    options = ("--teacher.engine", "vllm", "--teacher.kv_cache_gib", "0.25", "--teacher.max_model_len", "128")
    with server("teacher", tmp_path / "log", "--teacher.model", models["llama"], *options) as running:
        yield running


def members(session: int) -> dict[int, str]:
    """Processes of a session that live, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_until_gone(session: int, patience_s: float = 20.0) -> dict[int, str]:
    deadline = time.monotonic() + patience_s
    while (left := members(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_it_scores_like_transformers_refuses_what_it_cannot_and_ends_cleanly(
    teacher: Server, models: dict[str, str]
) -> None:
    rng = np.random.default_rng(0)
    sequences = [
        (rng.integers(0, 261, size).tolist(), prompt) for size, prompt in ((128, 1), (2, 1), (90, 89), (40, 7))
    ]

    async def ask(top_k: int) -> tuple[TeacherInfo, TeacherScores]:
        async with TeacherClient([teacher.url], key=KEY) as client:
            return (await client.info())[0], await client.score(sequences * 8, top_k=top_k)

    engine = TransformersEngine(TeacherConfig(model=models["llama"], device="cpu"))
    encoded = [EncodedSequence(ids, prompt) for ids, prompt in sequences * 8]
    for top_k in (5, 261):
        info, ours = asyncio.run(ask(top_k))
        theirs = score_alone(engine, encoded, top_k=top_k, temperature=1.0)
        np.testing.assert_array_equal(ours.row_offsets, theirs.row_offsets)
        np.testing.assert_allclose(ours.token_logprobs, theirs.token_logprobs, atol=1e-4)
        np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=1e-4)
        np.testing.assert_allclose(ours.tail_logprobs, theirs.tail_logprobs, atol=1e-4)
        assert (ours.topk_ids == theirs.topk_ids).mean() > 0.99  # equal but for rounding
        assert np.isnan(ours.entropies).all()
    assert (info.engine, info.temperature_support, info.max_model_len) == ("vllm", "one", 128)
    with teacher.client() as client:
        for change, field in (
            ({"temperature": 2.0}, "temperature"),
            ({"sequences": [{**GOOD, "support_ids": [[1], [2]]}]}, "sequences.0.support_ids"),
        ):
            refused = client.post("/v1/teacher/logprobs", json={"sequences": [GOOD], "top_k": 1, **change})
            assert (refused.status_code, refused.json()["field"]) == (422, field)
    assert len(members(teacher.process.pid)) > 1  # vLLM's own processes
    teacher.process.send_signal(signal.SIGTERM)
    assert teacher.process.wait(timeout=60) == 0
    assert wait_until_gone(teacher.process.pid) == {}
    assert "Traceback" not in teacher.log.read_text()


@pytest.mark.long
def test_a_killed_engine_ends_the_server(teacher: Server) -> None:
    core = next(pid for pid, line in members(teacher.process.pid).items() if "EngineCore" in line)
    os.kill(core, signal.SIGKILL)
    told = None
    while teacher.process.poll() is None:
        try:
            told = httpx.get(f"{teacher.url}/health", timeout=5.0, trust_env=False).status_code
        except httpx.TransportError:
            break
    assert teacher.process.wait(timeout=60) == 1
    assert told in (200, 503)  # the end is quick: nobody may be left to see the 503
    assert "distillserve: the teacher's engine failed: EngineDeadError" in teacher.log.read_text()
    assert wait_until_gone(teacher.process.pid) == {}


@pytest.mark.long
def test_a_plain_vllm_server_is_a_teacher(models: dict[str, str], tmp_path: Path) -> None:
    options = ("--max-logprobs", "30", "--max-model-len", "129", "--kv-cache-memory-bytes", str(1 << 28))
    rng = np.random.default_rng(1)
    sequences = [(rng.integers(0, 261, size).tolist(), prompt) for size, prompt in ((128, 1), (2, 1), (40, 7))]

    async def ask(url: str) -> tuple[TeacherInfo, TeacherScores]:
        async with VllmTeacherClient([url], key=KEY) as client:
            return (await client.info())[0], await client.score(sequences, top_k=20)

    with plain_vllm(models["qwen3"], tmp_path / "log", *options) as running:
        info, theirs = asyncio.run(ask(running.url))
    assert (info.padded_vocab_size, info.max_top_k, info.max_model_len) == (261, 30, 128)
    engine = TransformersEngine(TeacherConfig(model=models["qwen3"], device="cpu"))
    ours = score_alone(engine, [EncodedSequence(ids, prompt) for ids, prompt in sequences], top_k=20, temperature=1.0)
    np.testing.assert_array_equal(ours.row_offsets, theirs.row_offsets)
    for name in ("token_logprobs", "topk_logprobs", "tail_logprobs"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4)
    assert (ours.topk_ids == theirs.topk_ids).mean() > 0.99  # equal but for rounding
