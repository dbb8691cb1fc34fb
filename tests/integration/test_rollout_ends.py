"""Ends of a real rollout server of two workers: whatever it is doing, it is gone in time, and all that it started with it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from services.rollout.process import GRACE_S
from tests.integration.processes import Family, Server, command, environment, server, wait_until
from tests.integration.raw_http import connection, head

pytestmark = pytest.mark.integration

POST = "POST /v1/rollouts HTTP/1.1"


@contextmanager
def two_workers(model: str, log: Path) -> Iterator[tuple[Server, Family]]:
    options = [
        "--rollout.tensor_parallel_size",
        "2",
        "--rollout.max_model_len",
        "256",
        "--sampling.max_new_tokens",
        "16",
    ]
    with server("rollout", log, "--student.model", model, *options) as running:
        family = Family.of(running.process.pid)
        assert len(family.pids) >= 4, "a server, its engine and two workers"
        yield running, family


@contextmanager
def trainer(module: str, running: Server, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    words = [sys.executable, "-m", f"tests.integration.{module}", running.url, *arguments]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment())
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def busy(running: Server, model: str) -> Iterator[None]:
    """Silent connections, a request that is worked on, and a push whose sender has stopped: its workers wait in a receive."""
    body = json.dumps({"prompts": [[60]] * 64, "sampling": {"max_new_tokens": 250}}).encode()
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(connection(running))
        asking = stack.enter_context(connection(running))
        stuck = stack.enter_context(trainer("abandoning_trainer", running, model, "update"))
        assert stuck.stdout is not None and "begun" in stuck.stdout.readline()
        asking.sendall(head(POST, content_length=len(body)) + body)
        time.sleep(0.5)
        yield


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_signal_ends_a_server_whatever_it_is_doing(models: dict[str, str], tmp_path: Path) -> None:
    with two_workers(models["qwen3"], tmp_path / "log") as (running, family), busy(running, models["qwen3"]):
        said = len(running.log.read_text().splitlines())
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(GRACE_S + 5) in (0, 143)
        wait_until(family.is_gone, 5.0)
        lines = running.log.read_text().splitlines()[said:]
        assert len(lines) < 15 and "Traceback" not in "".join(lines), lines


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_second_ctrl_c_ends_a_busy_server_at_once(models: dict[str, str], tmp_path: Path) -> None:
    with two_workers(models["qwen3"], tmp_path / "log") as (running, family), busy(running, models["qwen3"]):
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(2.0) == 130
        wait_until(family.is_gone, 5.0)


@pytest.mark.timeout(400)
def test_an_idle_server_ends_in_order(models: dict[str, str], tmp_path: Path) -> None:
    """In silence where its workers end within vLLM's five seconds; on a machine with other work vLLM says that it kills them."""
    with two_workers(models["qwen3"], tmp_path / "log") as (running, family):
        said = running.log.read_text()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(GRACE_S + 5) == 0
        wait_until(family.is_gone, 5.0)
        lines = running.log.read_text().removeprefix(said).splitlines()
        assert len(lines) < 10 and all("[shutdown]" in line or "resource_tracker" in line for line in lines), lines


@pytest.mark.long
@pytest.mark.timeout(400)
def test_nothing_outlives_a_server_that_is_killed(models: dict[str, str], tmp_path: Path) -> None:
    with two_workers(models["qwen3"], tmp_path / "log") as (running, family), busy(running, models["qwen3"]):
        running.process.kill()
        wait_until(family.is_gone, 5.0)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_ten_moments_of_a_push(number: signal.Signals, models: dict[str, str], tmp_path: Path) -> None:
    """A trainer pushes without pause; a tenth of a push later each time, the server is ended."""
    seconds = []
    for moment in range(10):
        with (
            two_workers(models["qwen3"], tmp_path / f"log-{moment}") as (running, family),
            trainer("pushing_trainer", running, models["qwen3"]) as pushing,
        ):
            assert pushing.stdout is not None
            pushing.stdout.readline()
            started = time.monotonic()
            pushing.stdout.readline()
            push_s = time.monotonic() - started
            time.sleep(push_s * moment / 10)
            started = time.monotonic()
            running.process.send_signal(number)
            wait_until(family.is_gone, 30.0)
            seconds.append(time.monotonic() - started)
            assert running.process.wait(1.0) in (0, 143, -signal.SIGKILL)
    print(number.name, "a push takes", round(push_s, 2), "s; ends took", [round(s, 1) for s in seconds])


def has_trained(metrics: Path) -> bool:
    return metrics.exists() and '"num_steps"' in metrics.read_text()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", ["up", "trainer"])
def test_nothing_outlives_a_whole_run_of_which_a_part_is_killed(
    victim: str, models: dict[str, str], tmp_path: Path
) -> None:
    seconds = []
    for moment in range(5):
        output, data = tmp_path / f"out-{moment}", tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(20)))
        words = command(
            *("up", "--student.model", models["qwen3"], "--teacher.model", models["qwen3"], "--data.path", str(data)),
            *("--rollout.max_model_len", "64", "--sampling.max_new_tokens", "8", "--pipeline.steps", "100000"),
            *("--pipeline.prompts_per_step", "8", "--rollout.tensor_parallel_size", "2", "--output.dir", str(output)),
            *("--output.save_every_steps", "0"),
        )
        run = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(partial(has_trained, output / "metrics.jsonl"), 300.0)
            time.sleep(0.13 * moment)  # a push is a third of a step
            family = Family.of(run.pid)
            assert len(family.pids) >= 7, "up, its three roles, an engine and two workers"
            (trainer_pid,) = [
                p.pid for p in psutil.Process(run.pid).children() if "train" in p.cmdline() and p.pid in family.pids
            ]
            started = time.monotonic()
            os.kill(run.pid if victim == "up" else trainer_pid, signal.SIGKILL)
            run.wait(30.0)
        finally:
            run.kill()
            run.wait()
        wait_until(family.is_gone, 30.0)
        seconds.append(time.monotonic() - started)
    print(f"of a run whose {victim} is killed nothing is left after", [round(s, 1) for s in seconds], "s")
