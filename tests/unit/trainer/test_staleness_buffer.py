"""Who may start when: the rule that no sample is born too old."""

import asyncio

import pytest

from services.errors import PeerError
from trainer.staleness_buffer import StalenessBuffer


async def starts(buffer: StalenessBuffer[str]) -> bool:
    """Whether a batch may be started now."""
    try:
        await asyncio.wait_for(buffer.slot(), timeout=0.01)
    except TimeoutError:
        return False
    return True


async def test_with_staleness_zero_rollouts_and_pushes_take_turns() -> None:
    buffer: StalenessBuffer[str] = StalenessBuffer(0)
    assert await starts(buffer)
    assert not await starts(buffer)
    buffer.put("first", 0)
    assert await buffer.get() == ("first", 0)
    assert not await starts(buffer)  # trained, but its weights are not live yet
    buffer.weights_live(1)
    assert await starts(buffer)


async def test_with_staleness_one_a_batch_may_be_one_version_behind() -> None:
    buffer: StalenessBuffer[str] = StalenessBuffer(1)
    assert await starts(buffer) and await starts(buffer)
    assert not await starts(buffer)
    buffer.put("first", 0)
    buffer.put("second", 0)
    assert await buffer.get() == ("first", 0)
    buffer.weights_live(1)
    assert await buffer.get() == ("second", 1)


@pytest.mark.parametrize(("max_staleness", "ages"), [(0, [0, 0, 0, 0]), (1, [0, 1, 1, 1]), (2, [0, 1, 2, 2])])
async def test_a_producer_that_runs_ahead_waits_for_each_push_and_the_age_of_its_batches_is_told(
    max_staleness: int, ages: list[int]
) -> None:
    buffer: StalenessBuffer[int] = StalenessBuffer(max_staleness)
    started = [asyncio.Event() for _ in ages]

    async def produce() -> None:
        for batch, event in enumerate(started):
            await buffer.slot()  # the only place where it can wait
            event.set()
            buffer.put(batch, buffer.version)

    async def consume() -> list[tuple[int, int]]:
        got = []
        for version in range(len(ages)):
            allowed = min(version + max_staleness + 1, len(ages))
            await started[allowed - 1].wait()
            got.append(await buffer.get())
            assert [event.is_set() for event in started].count(True) == allowed
            buffer.weights_live(version + 1)
        return got

    _, got = await asyncio.gather(produce(), consume())
    assert got == list(enumerate(ages))


async def test_a_consumer_waits_for_a_batch() -> None:
    buffer: StalenessBuffer[str] = StalenessBuffer(0)
    waiting = asyncio.create_task(buffer.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    buffer.put("late", 0)
    assert await waiting == ("late", 0)


@pytest.mark.parametrize("sampled", [0, 2])
async def test_a_batch_of_weights_that_were_not_live_is_an_error_of_its_server(sampled: int) -> None:
    buffer: StalenessBuffer[str] = StalenessBuffer(0)
    buffer.put("a batch", sampled)
    buffer.version = 1
    with pytest.raises(PeerError, match=f"sampled under version {sampled} for a step that starts from version 1"):
        await buffer.get()
