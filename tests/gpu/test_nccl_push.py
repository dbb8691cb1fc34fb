"""A push over vLLM's nccl engine between two GPUs: the same WeightSync, the same agreement of logprobs.

Run on a machine with two NVIDIA GPUs: `make test ARGS="-m gpu"`.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from services.clients import RolloutClient
from services.config import RunConfig
from services.schemas import RolloutSampling
from tests.integration.attach import PROMPTS
from tests.integration.processes import KEY, server
from tests.models import save_model
from trainer.model import load_student
from trainer.prompts import Prompt
from trainer.weight_sync import WeightSync

pytestmark = pytest.mark.gpu


@pytest.mark.timeout(900)
async def test_server_and_trainer_agree_after_pushes_over_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model", "qwen3")
    arguments = ["--student.model", folder, "--rollout.dtype", "bfloat16", "--rollout.max_model_len", "128"]
    arguments += ["--weight_sync.backend", "nccl", "--sampling.max_new_tokens", "16"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with server("rollout", tmp_path / "log", *arguments) as running:
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        config = RunConfig(student={"model": folder}, weight_sync={"backend": "nccl"}, sampling={"max_new_tokens": 16})
        model = load_student(config.student).to("cuda:1")
        async with RolloutClient([running.url], key=KEY) as client:
            canaries = [Prompt(row=1, token_ids=ids, text="") for ids in PROMPTS[:4]]
            sync = WeightSync(config, model, client, await client.info(), canaries, KEY)
            for version in range(3):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.02)
                residual = (await sync.push(version))["canary_residual"]
                completions = await client.generate(PROMPTS, RolloutSampling(max_new_tokens=16))
                assert {s.policy_version for c in completions for s in c.policy_versions} == {str(version)}
                assert np.isfinite(residual) and residual <= 0.05
            sync.close()
