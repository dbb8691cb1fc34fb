"""Who may start when: the rule that no sample is born too old."""

import asyncio
from dataclasses import dataclass, field

import pytest

from services.errors import PeerError
from trainer.staleness_buffer import StalenessBuffer, staleness


@dataclass(eq=False)
class Batch:
    """Groups by the versions of their completions; `fresh` says under which they are made again, one entry a renewal."""

    groups: list[list[int]]
    fresh: list[int] = field(default_factory=list)
    renewed: list[list[int]] = field(default_factory=list)

    def versions(self) -> list[list[int]]:
        return self.groups

    async def renew(self, places: list[int]) -> None:
        self.renewed.append(places)
        await asyncio.sleep(0)
        version = self.fresh.pop(0)
        for place in places:
            self.groups[place] = [version]


async def starts(buffer: StalenessBuffer[Batch]) -> bool:
    """Whether a batch may be started now."""
    try:
        await asyncio.wait_for(buffer.slot(), timeout=0.01)
    except TimeoutError:
        return False
    return True


def begun(max_staleness: int) -> StalenessBuffer[Batch]:
    """A buffer after the first push."""
    buffer: StalenessBuffer[Batch] = StalenessBuffer(max_staleness)
    buffer.weights_live(0)
    return buffer


async def test_with_staleness_zero_rollouts_and_pushes_take_turns() -> None:
    buffer: StalenessBuffer[Batch] = StalenessBuffer(0)
    assert not await starts(buffer)  # the servers do not hold the student's weights yet
    buffer.weights_live(0)
    assert await starts(buffer)
    assert not await starts(buffer)
    first = Batch([[0, 0]])
    buffer.put(first)
    assert await buffer.get() is first
    assert not await starts(buffer)  # trained, but its weights are not live yet
    buffer.weights_live(1)
    assert await starts(buffer)


async def test_with_staleness_one_a_batch_may_be_one_version_behind() -> None:
    buffer = begun(1)
    assert await starts(buffer) and await starts(buffer)
    assert not await starts(buffer)
    first, second = Batch([[0]]), Batch([[1, 0]])
    buffer.put(first)
    buffer.put(second)
    assert await buffer.get() is first
    buffer.weights_live(1)
    assert await buffer.get() is second and second.renewed == []


async def test_weights_that_are_pushed_once_more_free_no_slot() -> None:
    """To servers that were started again."""
    buffer = begun(0)
    assert await starts(buffer)
    buffer.weights_live(0)
    assert not await starts(buffer)
    buffer.weights_live(1)
    assert await starts(buffer) and not await starts(buffer)


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
async def test_a_producer_that_runs_ahead_waits_for_each_push(max_staleness: int) -> None:
    buffer, num_batches, live = begun(max_staleness), 4, 0
    started = [asyncio.Event() for _ in range(num_batches)]
    batches = [Batch([]) for _ in range(num_batches)]

    async def produce() -> None:
        for number, event in enumerate(started):
            await buffer.slot()  # the only place where it can wait
            event.set()
            buffer.put(batches[number])
            batches[number].groups.append([live])

    async def consume() -> list[Batch]:
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
    assert got == batches


async def test_a_consumer_waits_for_a_batch() -> None:
    buffer = begun(0)
    waiting = asyncio.create_task(buffer.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    late = Batch([[0]])
    buffer.put(late)
    assert await waiting is late


@pytest.mark.parametrize(
    ("groups", "max_staleness", "stale"),
    [
        ([[1], [1, 0], [1]], 0, [1]),
        ([[2, 1], [1], [0]], 0, [0, 2]),
        ([[2]], 1, [0]),
        ([[1, 0], [1]], 1, []),
        ([[], [1]], 0, []),
    ],
)
async def test_groups_of_weights_that_were_not_live_are_made_again_in_their_places(
    groups: list[list[int]], max_staleness: int, stale: list[int]
) -> None:
    buffer = begun(max_staleness)
    batch = Batch([list(group) for group in groups], fresh=[1])
    buffer.put(batch)
    buffer.weights_live(1)
    assert await buffer.get() is batch
    assert batch.renewed == ([stale] if stale else [])
    assert batch.groups == [[1] if place in stale else group for place, group in enumerate(groups)]


async def test_groups_that_are_too_old_again_and_again_are_an_error_of_their_server() -> None:
    buffer = begun(0)
    batch = Batch([[1], [1, 0]], fresh=[0, 0])
    buffer.put(batch)
    buffer.weights_live(1)
    with pytest.raises(PeerError, match="sampled under version 0 for a step that starts from version 1"):
        await buffer.get()
    assert batch.renewed == [[1], [1]]


async def test_before_the_first_push_nothing_may_be_trained_on() -> None:
    buffer: StalenessBuffer[Batch] = StalenessBuffer(1)
    buffer.put(Batch([[0]], fresh=[0, 0]))
    with pytest.raises(PeerError, match="version 0 for a step that starts from version -1"):
        await buffer.get()


async def test_who_is_cancelled_while_groups_are_made_again_has_lost_nothing() -> None:
    buffer = begun(0)
    batch = Batch([[0], [1]], fresh=[1])
    buffer.put(batch)
    buffer.weights_live(1)
    getting = asyncio.create_task(buffer.get())
    while not batch.renewed:
        await asyncio.sleep(0)
    getting.cancel()
    await asyncio.wait({getting})
    assert await buffer.get() is batch and batch.groups == [[1], [1]]


def test_a_batch_is_as_old_as_its_oldest_completion() -> None:
    assert [staleness([3, 2, 3], 4), staleness([4], 4), staleness([], 4)] == [2, 0, 0]
