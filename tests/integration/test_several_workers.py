"""Rollout servers of two workers, tensor or data parallel, of a dense model and of a mixture of experts: pushes hold, whatever
broke off before."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from services.errors import WeightSyncError
from services.weight_transfer.source import CheckpointSource
from tests.integration.attach import BEHIND_THE_LAYERS, BreaksOff, attached, push_and_compare, status
from tests.integration.processes import Server, environment, server, wait_until
from tests.models import save_model
from tests.pushing import learner_of

pytestmark = [pytest.mark.integration, pytest.mark.long]


class Stalls(CheckpointSource):
    """Sends a few tensors, says so, and sends no more until it is let go."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.begun, self.let_go = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for item in super().__iter__():
            if item[0] == BEHIND_THE_LAYERS:
                self.begun.set()
                self.let_go.wait(60.0)
            yield item


async def push_often(url: str, folder: str, num_pushes: int) -> None:
    """Before the last push but one, one breaks off."""
    learner = learner_of(folder)
    async with attached(learner, url) as (pushing, client):
        for version in range(num_pushes):
            if version == num_pushes - 2:
                with pytest.raises(WeightSyncError, match="breaks off"):
                    await pushing.push_once(version, BreaksOff(learner.student.model, torch.float32))
            await push_and_compare(pushing, client, version)


def stop_a_trainer(running: Server, folder: str) -> None:
    """In the middle of a push, without ending it: its workers wait for the rest until their deadline."""
    words = [sys.executable, "-m", "tests.integration.abandoning_trainer", running.url, folder, "update"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    assert "begun" in process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: status(running)["admits"] and status(running)["holder"] is None)
        assert status(running)["policy_version"] == "mixed"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def kill_a_worker(running: Server, folder: str) -> None:
    """In the middle of a push: the trainer hears of it, and the server ends."""
    learner = learner_of(folder)
    everything = psutil.Process(running.process.pid).children(recursive=True)
    workers = [
        p for p in everything if "Worker_TP1" in " ".join(p.cmdline()) or "EngineCore_DP1" in " ".join(p.cmdline())
    ]
    assert len(workers) == 1, [p.cmdline() for p in everything]
    async with attached(learner, running.url, stage_timeout_s=20.0) as (attached_trainer, _):
        await attached_trainer.push(0)
        stalls = Stalls(learner.student.model, torch.float32)
        attached_trainer.sync._sender._bucket_bytes = 1
        pushing = asyncio.create_task(attached_trainer.push_once(1, stalls))
        assert await asyncio.to_thread(stalls.begun.wait, 60.0)
        workers[0].kill()
        stalls.let_go.set()
        with pytest.raises(WeightSyncError, match=running.url):
            await asyncio.wait_for(pushing, 60.0)
        await asyncio.to_thread(running.process.wait, 30.0)
    psutil.wait_procs(everything, timeout=10.0)
    assert not [p for p in everything if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("parallel", ["tensor", "data"])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
async def test_pushes_hold_after_senders_that_fail_or_stop_and_workers_that_die(
    architecture: str, parallel: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    folder = save_model(tmp_path / "model", architecture)
    options = ["--student.model", folder, f"--rollout.{parallel}_parallel_size", "2", "--rollout.max_model_len", "128"]
    options += ["--sampling.max_new_tokens", "16"]
    with server("rollout", tmp_path / "log", *options) as running:
        await push_often(running.url, folder, 5)
        stop_a_trainer(running, folder)
        await push_often(running.url, folder, 5)
        await kill_a_worker(running, folder)
    with server("rollout", tmp_path / "log2", *options) as running:
        await push_often(running.url, folder, 2)
