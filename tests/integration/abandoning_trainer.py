"""A trainer that pushes once, begins a second push, says so and waits to be killed: python -m ... URL MODEL STAGE."""

import asyncio
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from services.config import WeightSyncConfig
from services.weight_transfer.source import CheckpointSource
from tests.integration.attach import BEHIND_THE_LAYERS, attached
from tests.pushing import learner_of


class Stops(CheckpointSource):
    """Sends a few tensors, says so and goes no further."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for item in super().__iter__():
            if item[0] == BEHIND_THE_LAYERS:
                wait_for_the_end()
            yield item


def wait_for_the_end() -> None:
    print("begun", flush=True)
    threading.Event().wait()


async def main(url: str, model: str, stage: str) -> None:
    learner = learner_of(model)
    async with attached(learner, url, lease_s=5.0, stage_timeout_s=10.0) as (pushing, _):
        await pushing.push(0)
        if stage == "start":
            await pushing.sync._control.pause(30.0)
            await pushing.sync._control.start()
            wait_for_the_end()
        await pushing.push_once(1, Stops(learner.student.model, torch.float32))


if __name__ == "__main__":
    # A bucket a layer: a broken push leaves one loaded and one empty.
    section: Any = WeightSyncConfig
    section.bucket_bytes = property(lambda _: 1)
    asyncio.run(main(*sys.argv[1:]))
