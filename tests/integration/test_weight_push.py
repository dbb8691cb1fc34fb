"""Pushes to a real vLLM: after each, the server's logprobs are the trainer's, also after a push that broke off."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from services.config import RunConfig
from services.errors import WeightSyncError
from services.schemas import RolloutCompletion, RolloutSampling
from services.weight_transfer import trainer_engine
from services.weight_transfer.source import CheckpointSource
from tests.integration.attach import PROMPTS, attached
from tests.integration.processes import Server, server
from trainer.model import load_student
from trainer.weight_sync import WeightSync

pytestmark = pytest.mark.integration

CASES = [("qwen3", "float32"), ("llama", "float32"), ("qwen3", "bfloat16"), ("llama", "bfloat16")]
NUM_PUSHES = 5


@contextmanager
def serve(architecture: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    if (architecture, dtype) == CASES[0]:
        yield request.getfixturevalue("rollout_server")
        return
    model = request.getfixturevalue("models")[architecture]
    arguments = ["--student.model", model, "--rollout.dtype", dtype, "--rollout.max_model_len", "128"]
    with server("rollout", tmp_path / "log", *arguments, "--sampling.max_new_tokens", "16") as running:
        yield running


def change(model: PreTrainedModel) -> None:
    """An optimizer step large enough to see."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


@torch.no_grad()
def differences(model: PreTrainedModel, completions: list[RolloutCompletion]) -> np.ndarray:
    """Per token, against the model's own logits, each sequence run alone."""
    found = []
    for completion in completions:
        prompt = PROMPTS[completion.prompt_index]
        ids = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
        logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
        ours = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        found.append(np.abs(ours.numpy() - completion.rollout_logprobs))
    return np.concatenate(found)


class BreaksOff(CheckpointSource):
    """Sends a few tensors, then fails, as a trainer that dies would."""

    def metadata(self) -> list:
        if self._metadata is None:
            self._metadata = CheckpointSource(self._model, self._dtype).metadata()
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, item in enumerate(super().__iter__()):
            if index == 5:
                raise RuntimeError("the trainer breaks off here")
            yield item


async def break_off(sync: WeightSync, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a push of other weights in small buckets and abort it between two tensors of a layer."""
    sync._disconnect()
    with monkeypatch.context() as patch:
        patch.setattr(trainer_engine, "CheckpointSource", BreaksOff)
        patch.setattr(RunConfig.model_fields["weight_sync"].annotation, "bucket_bytes", property(lambda _: 1 << 12))
        with pytest.raises(WeightSyncError, match="breaks off"):
            await asyncio.to_thread(sync._send, 99)
    sync._disconnect()


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
@pytest.mark.timeout(400)
async def test_server_and_trainer_agree_after_every_push(
    architecture: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    with serve(architecture, dtype, request, tmp_path) as running:
        model = load_student(RunConfig(student={"model": request.getfixturevalue("models")[architecture]}).student)
        async with attached(model, running.url) as (sync, client):
            for version in range(NUM_PUSHES):
                change(model)
                if version == 3:
                    await break_off(sync, model, monkeypatch)
                    assert running.client().get("/weight_info").json()["weight_version"] == "2"
                    change(model)
                metrics = await sync.push(version)
                completions = await client.generate(PROMPTS, RolloutSampling(max_new_tokens=16))
                assert {s.policy_version for c in completions for s in c.policy_versions} == {str(version)}
                found = differences(model, completions)
                if dtype == "float32":
                    assert found.max() <= 1e-4
                    assert metrics["canary_residual"] <= 1e-4
                else:
                    assert found.mean() <= 0.02  # rounding of two implementations; a stale head is off by 0.1 and more


async def test_an_update_that_a_dead_trainer_left_open_does_not_stop_the_next(
    rollout_server: Server, models: dict[str, str]
) -> None:
    with rollout_server.client() as http:
        assert http.post("/start_weight_update").is_success
    model = load_student(RunConfig(student={"model": models["qwen3"]}).student)
    async with attached(model, rollout_server.url) as (sync, client):
        await sync.push(0)
        completions = await client.generate(PROMPTS, RolloutSampling(max_new_tokens=16))
    assert differences(model, completions).max() <= 1e-4


async def test_a_parameter_that_never_arrives_is_named(rollout_server: Server, models: dict[str, str]) -> None:
    class LeavesOut(CheckpointSource):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return (item for item in super().__iter__() if "layers.1.mlp" not in item[0])

    model = load_student(RunConfig(student={"model": models["qwen3"]}).student)
    async with attached(model, rollout_server.url) as (sync, _):
        await sync.push(0)
        sync._engine.source = LeavesOut(model, torch.float32)
        with pytest.raises(WeightSyncError, match=r"no weights arrived for .*layers\.1\.mlp"):
            await asyncio.to_thread(sync._send, 1)
        await sync.push(2)  # and the next full push is whole again


async def test_damaged_bytes_are_noticed(
    rollout_server: Server, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.weight_transfer import gloo

    model = load_student(RunConfig(student={"model": models["qwen3"]}).student)
    async with attached(model, rollout_server.url) as (sync, _):
        await sync.push(0)
        with monkeypatch.context() as patch:
            patch.setattr(gloo, "digest_of", lambda packed: torch.zeros(16, dtype=torch.uint8))
            with pytest.raises(WeightSyncError, match="arrived damaged"):
                await asyncio.to_thread(sync._send, 1)
        sync._disconnect()
        await sync.push(2)
