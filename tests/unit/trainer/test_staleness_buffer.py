"""Who may start when: the rule that no sample is born too old."""

import asyncio

import pytest

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


@pytest.mark.parametrize(
    ("max_staleness", "ages", "most_started"), [(0, [0, 0, 0, 0], 1), (1, [0, 1, 1, 1], 2), (2, [0, 1, 2, 2], 3)]
)
async def test_a_producer_that_runs_ahead_is_held_and_the_age_of_its_batches_told(
    max_staleness: int, ages: list[int], most_started: int
) -> None:
    buffer: StalenessBuffer[int] = StalenessBuffer(max_staleness)
    started, held, push = 0, asyncio.Event(), asyncio.Event()

    async def produce() -> None:
        nonlocal started
        for batch in range(4):
            if started - buffer.version > max_staleness:
                held.set()  # the next slot() waits for a push
            await buffer.slot()
            started += 1
            assert started - buffer.version <= most_started
            buffer.put(batch, buffer.version)
        held.set()

    async def consume() -> list[tuple[int, int]]:
        got = []
        for version in range(1, 5):
            got.append(await buffer.get())
            await push.wait()
            buffer.weights_live(version)
        return got

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(produce())
        consumer = tasks.create_task(consume())
        await held.wait()
        assert started == most_started  # no further start until a push is done
        push.set()
    assert consumer.result() == list(enumerate(ages))
    assert (started, buffer.version) == (4, 4)


async def test_a_consumer_waits_for_a_batch() -> None:
    buffer: StalenessBuffer[str] = StalenessBuffer(0)
    waiting = asyncio.create_task(buffer.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    buffer.put("late", 0)
    assert await waiting == ("late", 0)


async def test_a_batch_that_is_too_old_is_a_bug() -> None:
    buffer: StalenessBuffer[str] = StalenessBuffer(0)
    buffer.put("old", 0)
    buffer.version = 1
    with pytest.raises(AssertionError, match="version 0 reached version 1"):
        await buffer.get()
