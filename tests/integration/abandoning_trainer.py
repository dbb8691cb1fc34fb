"""A trainer that pushes once, begins a second push, says so and waits to be killed: python -m ... URL MODEL STAGE."""

import asyncio
import signal
import sys
from collections.abc import Iterator

import torch

from services.config import RunConfig, WeightSyncConfig
from services.weight_transfer.source import CheckpointSource
from tests.integration.attach import attached
from trainer.model import load_student
from trainer.weight_sync import WeightSync


class Stops(CheckpointSource):
    """Sends a few tensors of a layer, says so and goes no further."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, item in enumerate(super().__iter__()):
            if index == 6:
                wait_for_the_end()
            yield item


def wait_for_the_end() -> None:
    print("begun", flush=True)
    signal.pause()


def abandon(sync: WeightSync, stage: str) -> None:
    sync._control.pause()
    if stage == "start":
        sync._control.start_weight_update()
        wait_for_the_end()
    source = Stops(sync._model, torch.float32)
    source._metadata = CheckpointSource(sync._model, torch.float32).metadata()
    sync._engine.source = source
    sync._engine.send_weights()


async def main(url: str, model: str, stage: str) -> None:
    student = load_student(RunConfig(student={"model": model}).student)
    async with attached(student, url) as (sync, _):
        await sync.push(0)
        abandon(sync, stage)


if __name__ == "__main__":
    # Several buckets a layer: a broken push leaves one half-filled.
    WeightSyncConfig.bucket_bytes = property(lambda _: 1 << 12)  # type: ignore[assignment]
    asyncio.run(main(*sys.argv[1:]))
