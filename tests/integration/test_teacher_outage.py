"""A teacher process that is killed and started again, or stopped, in the middle of a run's work; nothing is asked twice."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from services.clients import TeacherClient
from services.clients.teacher_probe import probe_sequences
from services.errors import ChangedTeacherError, OutageError
from services.process.event_loop import EventLoopThread
from services.process.signals import Interruption
from services.process.waiting import on_behalf_of
from tests.integration.processes import KEY, Server, end, server, wait_until
from trainer.watchdog import Watchdog

pytestmark = pytest.mark.integration

PROBE = probe_sequences([list(range(40, 90))])
WORK = [([60, 61, i], 1) for i in range(100)]


class Teacher:
    """One port, on which one process after the other serves."""

    def __init__(self, model: str, logs: Path, stack: ExitStack) -> None:
        self._model, self._logs, self._stack = model, logs, stack
        self._num_started, self._port = 0, 0
        self.running = self.start()

    def start(self, model: str | None = None, *options: str) -> Server:
        self._num_started += 1
        log = self._logs / f"teacher-{self._num_started}.log"
        arguments = ("--teacher.model", model or self._model, *options)
        self.running = self._stack.enter_context(server("teacher", log, *arguments, port=self._port))
        self._port = httpx.URL(self.running.url).port or 0
        return self.running

    def kill(self) -> None:
        self.running.process.send_signal(signal.SIGKILL)
        end(self.running.process)

    def num_scored(self) -> float:
        """Sequences, of the process that serves now."""
        return self.running.metric("sequences_total")


@pytest.fixture
def teacher(models: dict[str, str], tmp_path: Path) -> Iterator[Teacher]:
    with ExitStack() as stack:
        yield Teacher(models["llama"], tmp_path, stack)


@pytest.fixture
def loop() -> Iterator[EventLoopThread]:
    with EventLoopThread(Interruption()) as loop:
        yield loop


def attached(loop: EventLoopThread, teacher: Teacher, **options: Any) -> TeacherClient:
    """A client of the teacher, as a run has one."""

    async def attach() -> TeacherClient:
        client = TeacherClient([teacher.running.url], key=KEY, **options)
        await client.info()
        await client.keep_probe(PROBE)
        return client

    return loop.run(attach)


def score(loop: EventLoopThread, client: TeacherClient) -> np.ndarray:
    async def ask() -> np.ndarray:
        with on_behalf_of("step 3"):
            return (await client.score(WORK, top_k=4, max_rows_per_request=20)).token_logprobs

    return loop.run(ask)


def started_again_after(teacher: Teacher, seconds: float, *arguments: Any) -> threading.Timer:
    timer = threading.Timer(seconds, teacher.start, arguments)
    timer.start()
    return timer


@pytest.mark.parametrize("away_s", [pytest.param(2.0, id="2s"), pytest.param(60.0, id="60s", marks=pytest.mark.long)])
def test_a_teacher_that_is_killed_and_comes_back_costs_its_absence_and_no_row(
    away_s: float, teacher: Teacher, loop: EventLoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    client = attached(loop, teacher)
    expected = score(loop, client)
    teacher.kill()
    started = time.monotonic()
    starting = started_again_after(teacher, away_s)
    found = score(loop, client)
    took_s = time.monotonic() - started
    starting.join()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Each once; the probe before them, and again where the requests' own waits end seconds apart.
    num_probes, rest = divmod(teacher.num_scored() - len(WORK), len(PROBE))
    assert 1 <= num_probes <= 3 and rest == 0
    said = [r.getMessage() for r in caplog.records if r.name.startswith("services.clients")]
    told = [line for line in said if "waiting up to" in line]
    assert sum("is left alone" in line for line in said) == 1 and sum("is back after" in line for line in said) == 1
    assert len(told) <= took_s / 30.0 and (away_s < 30.0 or told)
    print(f"away for {away_s:.0f} s and the start of its process, answered after {took_s:.1f} s")
    loop.run(client.close)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("qwen3", (), r"is another model than at the start of the run: .* was "),
        (None, ("--teacher.max_model_len", "64"), r"takes less than at the start of the run: max_model_len = 64, was "),
        (
            None,
            ("--teacher.dtype", "bfloat16"),
            r"computes its model in another way \(engine, dtype or options\) than ",
        ),
    ],
    ids=["model", "limit", "dtype"],
)
def test_a_teacher_that_comes_back_as_another_one_is_refused_before_it_scores(
    model: str | None,
    options: tuple[str, ...],
    message: str,
    teacher: Teacher,
    loop: EventLoopThread,
    models: dict[str, str],
) -> None:
    client = attached(loop, teacher)
    score(loop, client)
    teacher.kill()
    starting = started_again_after(teacher, 0.0, None if model is None else models[model], *options)
    with pytest.raises(ChangedTeacherError, match=message):
        score(loop, client)
    starting.join()
    assert teacher.num_scored() <= len(PROBE)
    loop.run(client.close)


def test_a_teacher_away_for_longer_than_its_budget_is_an_outage(teacher: Teacher, loop: EventLoopThread) -> None:
    client = attached(loop, teacher, outage_s=3.0)
    teacher.kill()
    started = time.monotonic()
    with pytest.raises(OutageError, match=r"no teacher has answered for 3 s \(teacher_client\.outage_s\)"):
        score(loop, client)
    assert time.monotonic() - started < 10.0
    loop.run(client.close)


def test_of_a_stopped_teacher_the_watchdog_says_who_waits_for_it(
    teacher: Teacher, loop: EventLoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGSTOP: the connection lives, and nothing comes over it."""
    client = attached(loop, teacher)
    expected = score(loop, client)
    line = f"s for scores of {teacher.running.url} without a sign of life"

    def is_told() -> bool:
        return any(line in r.getMessage() for r in caplog.records)

    def go_on() -> None:
        wait_until(is_told)
        os.kill(teacher.running.process.pid, signal.SIGCONT)

    os.kill(teacher.running.process.pid, signal.SIGSTOP)
    waiting = threading.Thread(target=go_on)
    waiting.start()
    try:
        with Watchdog(dead_s=300.0, patience_s=2.0):
            found = score(loop, client)
    finally:
        os.kill(teacher.running.process.pid, signal.SIGCONT)
        waiting.join()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    told = [r for r in caplog.records if line in r.getMessage()]
    assert told[0].levelno == logging.WARNING and told[0].getMessage().startswith("step 3 has waited ")
    loop.run(client.close)
