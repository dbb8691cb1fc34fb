"""A rollout server with two workers: pushes hold, and nothing that a trainer leaves behind disturbs the next one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from services.errors import WeightSyncError
from tests.integration.attach import attached, push_and_compare, status
from tests.integration.processes import Server, environment, server, wait_until
from tests.pushing import learner_of

pytestmark = [pytest.mark.integration, pytest.mark.long]


async def attach_and_push(url: str, model_folder: str, num_pushes: int) -> None:
    async with attached(learner_of(model_folder), url) as (pushing, client):
        for version in range(num_pushes):
            await push_and_compare(pushing, client, version)


def kill_a_trainer(running: Server, model: str, stage: str) -> None:
    """Let another process begin a push up to `stage`, then end it without a chance to clear anything."""
    words = [sys.executable, "-m", "tests.integration.abandoning_trainer", running.url, model, stage]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    assert "begun" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


async def fail_a_stage(running: Server, model_folder: str) -> None:
    """Calls that fail in both workers."""
    async with attached(learner_of(model_folder), running.url) as (pushing, _):
        control = pushing.sync._control
        await control.pause(30.0)
        await control.start()
        for _ in range(2):
            with pytest.raises(WeightSyncError, match="receive failed in worker 0: "):
                await control.receive({"nonsense": 1})
            with pytest.raises(WeightSyncError, match="connect failed in worker 0: "):
                await control.connect({})


@pytest.mark.timeout(400)
async def test_two_workers_hold_what_is_pushed_also_after_trainers_that_were_killed(
    models: dict[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    options = ["--rollout.tensor_parallel_size", "2", "--rollout.max_model_len", "128"]
    log, model = tmp_path / "log", models["qwen3"]
    with server("rollout", log, "--student.model", model, "--sampling.max_new_tokens", "16", *options) as running:
        said = log.read_text()
        await attach_and_push(running.url, model, 5)
        assert log.read_text() == said  # attaching, pushing and leaving are nothing to talk of
        assert is_free(running, 2)

        for stage in ("start", "update"):
            kill_a_trainer(running, model, stage)
            wait_until(lambda: status(running)["workers"] is not None)  # they can be asked once they have noticed
            found = status(running)
            assert not found["admits"] and found["holder"]["left_s"] > 0
            assert [worker["update"] for worker in found["workers"]] == ["started"] * 2
            wait_until(lambda: status(running)["admits"])  # after the lease, by itself
            assert is_free(running, 2)
            assert (status(running)["policy_version"] == "mixed") == (stage == "update")
            await attach_and_push(running.url, model, 1)

        await fail_a_stage(running, model)
        await attach_and_push(running.url, model, 1)
        assert is_free(running, 2)
    said = log.read_text()
    assert "Traceback" not in said and "ERROR" not in said, said[-5000:]


def is_free(running: Server, num_workers: int) -> bool:
    """Nobody holds the server, no worker has a group or half an update."""
    found = status(running)
    updates = [(worker["update"], worker["connected"]) for worker in found["workers"]]
    return found["holder"] is None and found["admits"] and updates == [("none", False)] * num_workers
