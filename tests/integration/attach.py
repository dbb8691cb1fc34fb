"""A trainer's end of a weight push against a running rollout server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from transformers import PreTrainedModel

from services.clients import RolloutClient
from services.config import RunConfig
from tests.integration.processes import KEY
from trainer.prompts import Prompt
from trainer.weight_sync import WeightSync

PROMPTS = [[40 + i, 50, 60 + i] for i in range(16)]


@asynccontextmanager
async def attached(model: PreTrainedModel, url: str) -> AsyncIterator[tuple[WeightSync, RolloutClient]]:
    config = RunConfig(weight_sync={"stage_timeout_s": 30.0, "bucket_mib": 1}, sampling={"max_new_tokens": 16})
    async with RolloutClient([url], key=KEY) as client:
        canaries = [Prompt(row=1, token_ids=ids, text="") for ids in PROMPTS[:4]]
        sync = WeightSync(config, model, client, await client.info(), canaries, KEY)
        try:
            yield sync, client
        finally:
            await asyncio.to_thread(sync.close)
