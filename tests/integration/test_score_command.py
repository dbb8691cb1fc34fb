"""`distillserve score` as a real process: against a real teacher, and ended by real signals in the middle of its work."""

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import numpy as np
import pytest

from services.clients import TeacherClient
from services.config import TeacherConfig
from services.score.command import read_shards
from services.teacher.jobs import EncodedSequence
from services.teacher.transformers.engine import TransformersEngine
from tests.integration.processes import KEY, command, environment, server
from tests.scoring import score_alone
from tests.scripted_teacher import ScriptedTeacher

pytestmark = pytest.mark.integration

NUM_ROWS, SHARD_ROWS = 95, 10
NUM_SHARDS = 10


def arguments(tmp_path: Path, output: str, url: str, *options: str) -> list[str]:
    rows = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}."} for i in range(NUM_ROWS)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ("--input", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / output), "--url", url)
    return command("score", *where, "--shard-rows", str(SHARD_ROWS), *options)


def run(words: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)


def test_a_real_teacher_gives_what_its_engine_computes(tmp_path: Path, models: dict[str, str]) -> None:
    with server("teacher", tmp_path / "log", "--teacher.model", models["qwen3"]) as teacher:
        done = run(arguments(tmp_path, "scores", teacher.url, "--top-k", "6", "--temperature", "0.5"))
        assert done.returncode == 0, done.stderr
        table = run(command("score", "2+2=", "4.", "--url", teacher.url, "--top-k", "2"))
    engine = TransformersEngine(TeacherConfig(model=models["qwen3"], device="cpu"))
    sequences = [
        EncodedSequence([*f"{i}+{i}=".encode(), *f"{2 * i}.".encode()], len(f"{i}+{i}=")) for i in range(NUM_ROWS)
    ]
    expected = score_alone(engine, sequences, top_k=6, temperature=0.5)
    scored = list(read_shards(tmp_path / "scores"))
    assert [row.row for row in scored] == list(range(1, NUM_ROWS + 1))
    for name, column in expected.columns().items():
        ours = np.concatenate([row.arrays[name] for row in scored])
        if ours.dtype.kind == "f":
            np.testing.assert_allclose(ours, column, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(ours, column, err_msg=name)
    pair = score_alone(engine, [EncodedSequence(list(b"2+2=4."), 4)], top_k=2, temperature=1.0)
    total = float(table.stdout.split("total logprob ")[1].split()[0])
    assert total == pytest.approx(float(pair.token_logprobs.sum()), abs=2e-4)
    assert KEY not in table.stdout + table.stderr + done.stdout + done.stderr


@pytest.fixture
def slow_teacher() -> Iterator[ScriptedTeacher]:
    with ScriptedTeacher().serving() as teacher:
        teacher.delay_s = 0.15
        yield teacher


def end_in_the_middle(words: list[str], folder: Path, number: signal.Signals) -> tuple[int, str]:
    """(exit code, stderr) of a run that got a signal when three shards were there."""
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "scores-00002.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def listed(folder: Path) -> list[str]:
    return [shard["file"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_an_ended_run_is_finished_by_the_next_to_the_same_bytes(
    number: signal.Signals, code: int, tmp_path: Path, slow_teacher: ScriptedTeacher
) -> None:
    words, folder = arguments(tmp_path, "scores", slow_teacher.url), tmp_path / "scores"
    returncode, err = end_in_the_middle(words, folder, number)
    assert returncode == code and "Traceback" not in err
    if number == signal.SIGINT:
        assert err.splitlines()[-1] == "distillserve: interrupted"
    complete = listed(folder)
    assert 2 <= len(complete) < NUM_SHARDS  # between a shard's rename and the manifest's there is a moment
    before = {name: (folder / name).stat().st_ino for name in complete}
    assert len(list(read_shards(folder, partial=True))) == SHARD_ROWS * len(complete)

    slow_teacher.delay_s = 0.0
    slow_teacher.bodies.clear()
    assert run(words).returncode == 0
    assert slow_teacher.num_asked == NUM_ROWS - SHARD_ROWS * len(complete)
    assert {name: (folder / name).stat().st_ino for name in complete} == before  # not written again

    assert run(arguments(tmp_path, "at-once", slow_teacher.url)).returncode == 0
    contents = [{p.name: p.read_bytes() for p in f.iterdir()} for f in (folder, tmp_path / "at-once")]
    assert contents[0] == contents[1] and len(contents[0]) == NUM_SHARDS + 1


def test_a_teacher_that_comes_back_is_asked_again() -> None:
    """The port is closed for a second, as it is between two processes of one server."""
    sequences = [([1, 2, i], 2) for i in range(20)]
    first = ScriptedTeacher()
    with first.serving():
        port = int(first.url.rsplit(":", 1)[1])

    def serve() -> None:
        with ScriptedTeacher(port).serving() as again:
            served.append(again)
            while not again.bodies:
                time.sleep(0.01)
            time.sleep(0.5)

    served: list[ScriptedTeacher] = []
    timer = Timer(1.0, serve)
    timer.start()

    async def score() -> int:
        async with TeacherClient([first.url], outage_s=30.0) as client:
            return len((await client.score(sequences, top_k=2)).token_logprobs)

    assert asyncio.run(score()) == 20
    timer.join()
    assert served[0].num_asked == 20
