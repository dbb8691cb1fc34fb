"""A rollout server with two workers: pushes hold, and nothing that a trainer leaves behind disturbs the next one."""

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from services.config import RunConfig
from services.errors import WeightSyncError
from services.schemas import RolloutSampling
from services.weight_transfer.control import WeightControlClient
from tests.integration.attach import PROMPTS, attached
from tests.integration.processes import KEY, Server, environment, server
from tests.integration.test_weight_push import change, differences
from trainer.model import load_student

pytestmark = pytest.mark.integration

CLEAR = [{"update_active": False, "reloading": False}] * 2


async def push_and_compare(url: str, model_folder: str, num_pushes: int) -> None:
    model = load_student(RunConfig(student={"model": model_folder}).student)
    async with attached(model, url) as (sync, client):
        for version in range(num_pushes):
            change(model)
            metrics = await sync.push(version)
            completions = await client.generate(PROMPTS, RolloutSampling(max_new_tokens=16))
            assert {s.policy_version for c in completions for s in c.policy_versions} == {str(version)}
            assert metrics["canary_residual"] <= 1e-4
            assert differences(model, completions).max() <= 1e-4


def status(running: Server) -> dict:
    with running.client() as client:
        return client.get("/v1/weights/status").json()


def kill_a_trainer(running: Server, model: str, stage: str) -> None:
    """Let another process begin a push up to `stage`, then end it without a chance to clear anything."""
    words = [sys.executable, "-m", "tests.integration.abandoning_trainer", running.url, model, stage]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    assert "begun" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def fail_a_stage(running: Server) -> None:
    """Calls that vLLM refuses in both workers."""
    control = WeightControlClient([running.url], [2], KEY, 30.0)
    control.start_weight_update()
    with pytest.raises(WeightSyncError, match=r"start_weight_update failed in worker 0: RuntimeError: .* already"):
        control.start_weight_update()
    with pytest.raises(WeightSyncError, match="update_weights failed in worker 0: ValueError: Invalid update_info"):
        control.update_weights({"nonsense": 1})
    with pytest.raises(WeightSyncError, match="init_weight_transfer_engine failed in worker 0: ValueError: Invalid"):
        control.init_weight_transfer_engine({})
    control.close()


@pytest.mark.timeout(400)
async def test_two_workers_hold_what_is_pushed_also_after_trainers_that_were_killed(
    models: dict[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    options = ["--rollout.tensor_parallel_size", "2", "--rollout.max_model_len", "128"]
    log, model = tmp_path / "log", models["qwen3"]
    with server("rollout", log, "--student.model", model, "--sampling.max_new_tokens", "16", *options) as running:
        said = log.read_text()
        await push_and_compare(running.url, model, 5)
        assert log.read_text() == said  # attaching, pushing and leaving are nothing to talk of
        assert status(running) == {"policy_version": "4", "paused": False, "workers": CLEAR}

        kill_a_trainer(running, model, "start")
        assert status(running) == {
            "policy_version": "0",
            "paused": True,
            "workers": [{"update_active": True, "reloading": True}] * 2,
        }
        await push_and_compare(running.url, model, 1)

        kill_a_trainer(running, model, "update")
        assert status(running)["paused"]  # answered once the workers have noticed
        await push_and_compare(running.url, model, 1)

        fail_a_stage(running)
        await push_and_compare(running.url, model, 1)
        assert status(running) == {"policy_version": "0", "paused": False, "workers": CLEAR}
    said = log.read_text()
    assert "Traceback" not in said and "ERROR" not in said and KEY not in said, said[-5000:]


@pytest.mark.parametrize(
    ("stage", "body", "detail"),
    [
        ("start_weight_update", b'{"x": 1}', "start_weight_update takes nothing (got x)"),
        ("init_weight_transfer_engine", b"", "init_weight_transfer_engine takes init_info (got nothing)"),
        ("update_weights", b"[]", "the body is a list; send a JSON object"),
        ("update_weights", b"{", "the body is no JSON: "),
        ("finish_weight_update", b'{"weight_version": 3}', "weight_version = 3 must be a string"),
    ],
)
def test_a_stage_takes_its_own_body_alone(rollout_server: Server, stage: str, body: bytes, detail: str) -> None:
    with rollout_server.client() as client:
        response: httpx.Response = client.post(f"/{stage}", content=body)
        assert response.status_code == 422 and response.json()["detail"].startswith(detail)
        assert client.get("/v1/weights/status").json()["workers"] == CLEAR[:1]
