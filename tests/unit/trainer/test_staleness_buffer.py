"""Who may start when: the rule that no sample is born too old."""

import asyncio

import pytest

from services.errors import PeerError
from trainer.staleness_buffer import StalenessBuffer, staleness


async def starts(buffer: StalenessBuffer[str]) -> bool:
    """Whether a batch may be started now."""
    try:
        await asyncio.wait_for(buffer.slot(), timeout=0.01)
    except TimeoutError:
        return False
    return True


def begun(max_staleness: int) -> StalenessBuffer[str]:
    """A buffer after the first push."""
    buffer: StalenessBuffer[str] = StalenessBuffer(max_staleness)
    buffer.weights_live(0)
    return buffer


async def test_with_staleness_zero_rollouts_and_pushes_take_turns() -> None:
    buffer: StalenessBuffer[str] = StalenessBuffer(0)
    assert not await starts(buffer)  # the servers do not hold the student's weights yet
    buffer.weights_live(0)
    assert await starts(buffer)
    assert not await starts(buffer)
    buffer.put("first", [0, 0])
    assert await buffer.get() == "first"
    assert not await starts(buffer)  # trained, but its weights are not live yet
    buffer.weights_live(1)
    assert await starts(buffer)


async def test_with_staleness_one_a_batch_may_be_one_version_behind() -> None:
    buffer = begun(1)
    assert await starts(buffer) and await starts(buffer)
    assert not await starts(buffer)
    buffer.put("first", [0])
    buffer.put("second", [1, 0])
    assert await buffer.get() == "first"
    buffer.weights_live(1)
    assert await buffer.get() == "second"


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
async def test_a_producer_that_runs_ahead_waits_for_each_push(max_staleness: int) -> None:
    buffer, num_batches, live = begun(max_staleness), 4, 0
    started = [asyncio.Event() for _ in range(num_batches)]

    async def produce() -> None:
        for number, event in enumerate(started):
            await buffer.slot()  # the only place where it can wait
            event.set()
            buffer.put(str(number), [live])

    async def consume() -> list[str]:
        nonlocal live
        got = []
        for version in range(num_batches):
            allowed = min(version + max_staleness + 1, num_batches)
            await started[allowed - 1].wait()
            got.append(await buffer.get())
            assert [event.is_set() for event in started].count(True) == allowed
            live = version + 1
            buffer.weights_live(live)
        return got

    _, got = await asyncio.gather(produce(), consume())
    assert got == ["0", "1", "2", "3"]


async def test_a_consumer_waits_for_a_batch() -> None:
    buffer = begun(0)
    waiting = asyncio.create_task(buffer.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    buffer.put("late", [0])
    assert await waiting == "late"


@pytest.mark.parametrize(
    ("sampled", "named", "max_staleness"),
    [([1, 0], 0, 0), ([2, 1], 2, 0), ([2], 2, 1), ([1, 0], None, 1), ([], None, 0)],
)
async def test_a_batch_of_weights_that_were_not_live_is_an_error_of_its_server(
    sampled: list[int], named: int | None, max_staleness: int
) -> None:
    buffer = begun(max_staleness)
    buffer.put("a batch", sampled)
    buffer.weights_live(1)
    if named is None:
        assert await buffer.get() == "a batch"
        return
    with pytest.raises(PeerError, match=f"sampled under version {named} for a step that starts from version 1"):
        await buffer.get()


async def test_before_the_first_push_nothing_may_be_trained_on() -> None:
    buffer: StalenessBuffer[str] = StalenessBuffer(1)
    buffer.put("a batch", [0])
    with pytest.raises(PeerError, match="version 0 for a step that starts from version -1"):
        await buffer.get()


def test_a_batch_is_as_old_as_its_oldest_completion() -> None:
    assert [staleness([3, 2, 3], 4), staleness([4], 4), staleness([], 4)] == [2, 0, 0]


async def test_weights_that_are_pushed_once_more_free_no_slot() -> None:
    """Or a batch would be begun too early, and be too old when it is trained on."""
    buffer: StalenessBuffer[str] = StalenessBuffer(0)
    buffer.weights_live(0)
    buffer.weights_live(0)
    assert await starts(buffer) and not await starts(buffer)
