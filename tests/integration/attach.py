"""A trainer's end of a weight push against a running rollout server, and what may happen to it on the way."""

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from services.clients import RolloutClient
from services.config import RunConfig
from services.weight_transfer.source import CheckpointSource
from services.wire.policy_label import PolicyLabel
from services.wire.rollout import RolloutCompletion, RolloutSampling
from tests.integration.processes import KEY, Server
from tests.pushing import Pushing
from trainer.data.prompts import Prompt
from trainer.learner import Learner
from trainer.weights.weight_sync import WeightSync

PROMPTS = [[40 + i, 50, 60 + i] for i in range(16)]
SAMPLING = RolloutSampling(max_new_tokens=16)
BEHIND_THE_LAYERS = "model.norm.weight"
"""When a trainer packs it, and each layer is a bucket, the workers have the first of the two layers: one is under way at most."""


@asynccontextmanager
async def attached(
    learner: Learner, *urls: str, run: str | None = None, **weight_sync: Any
) -> AsyncIterator[tuple[Pushing, RolloutClient]]:
    options = {"stage_timeout_s": 30.0, "bucket_mib": 1, **weight_sync}
    config = RunConfig(weight_sync=options, sampling={"max_new_tokens": 16})
    async with RolloutClient(list(urls), key=KEY) as client:
        canaries = [Prompt(row=1, token_ids=ids, text="") for ids in PROMPTS[:4]]
        device, infos = learner.ranks.device, await client.info()
        sync = WeightSync(config, device, client, infos, canaries, KEY, run or uuid.uuid4().hex[:8])
        try:
            await sync.hold()
            yield Pushing(sync, learner), client
        finally:
            await sync.close()


def change(model: nn.Module, scale: float = 0.02) -> None:
    """An optimizer step large enough to see."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


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


async def push_and_compare(pushing: Pushing, client: RolloutClient, version: int) -> None:
    """Push changed weights; what is sampled afterwards is of that version and of those weights, to 1e-4."""
    change(pushing.learner.student)
    metrics = await pushing.push(version)
    completions = await client.generate(PROMPTS, SAMPLING)
    labels = {PolicyLabel.parse(s.policy_version) for c in completions for s in c.policy_versions}
    assert {(label.version, label.run) for label in labels} == {(version, pushing.versions.run)} and len(labels) == 1
    assert metrics["canary_residual"] <= 1e-4
    assert differences(pushing.learner.student.model, completions).max() <= 1e-4


def status(running: Server) -> dict[str, Any]:
    with running.client() as client:
        found: dict[str, Any] = client.get("/v1/weights/status").raise_for_status().json()
    return found


class BreaksOff(CheckpointSource):
    """Sends a few tensors, then fails, as a trainer that dies would."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for item in super().__iter__():
            if item[0] == BEHIND_THE_LAYERS:
                raise RuntimeError("the trainer breaks off here")
            yield item
