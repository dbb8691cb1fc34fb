"""The channel over nccl without a GPU: a recording communicator in the place of vLLM's, everything else for real."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from services.weight_transfer import nccl
from services.weight_transfer.channel import Rendezvous
from services.weight_transfer.nccl import NcclChannel
from tests.loopbacks import available_loopbacks
from tests.nccl_group import join, rendezvous
from tests.unit.services.recording_nccl import Call, Communicator, RecordingNccl

CPU = torch.device("cpu")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordingNccl:
    recorded = RecordingNccl()
    monkeypatch.setattr(nccl, "PyNcclCommunicator", recorded.communicator)
    return recorded


@contextmanager
def group(meeting: Rendezvous) -> Iterator[list[NcclChannel]]:
    with ThreadPoolExecutor(meeting.world_size) as executor:
        channels = list(executor.map(lambda rank: join(meeting, rank, CPU), range(meeting.world_size)))
    try:
        yield channels
    finally:
        for channel in channels:
            channel.abort()


def broadcast_in_all(channels: list[NcclChannel], buffers: list[torch.Tensor]) -> None:
    with ThreadPoolExecutor(len(channels)) as executor:
        for call in [executor.submit(c.broadcast, b) for c, b in zip(channels, buffers, strict=True)]:
            call.result()


@pytest.mark.parametrize("host", available_loopbacks())
def test_what_rank_0_sends_arrives_in_every_other_rank(recorded: RecordingNccl, host: str) -> None:
    sent = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    with group(rendezvous(3, host=host)) as channels:
        buffers = [sent.clone(), torch.zeros_like(sent), torch.zeros_like(sent)]
        broadcast_in_all(channels, buffers)
    assert all(torch.equal(buffer, sent) for buffer in buffers)
    assert sorted(call.rank for call in recorded.calls if call.name == "init") == [0, 1, 2]
    assert {call.num_bytes for call in recorded.calls if call.name == "broadcast"} == {1000}


def test_a_broadcast_that_misses_a_rank_ends_at_the_deadline_and_leaves_the_group(recorded: RecordingNccl) -> None:
    with group(rendezvous(2, timeout_s=0.5)) as (sender, _):
        started = time.monotonic()
        recorded.absent.add(1)
        with pytest.raises(
            TimeoutError, match=r"a broadcast of 8 bytes over nccl took longer than 0\.5 s.*stage_timeout_s"
        ):
            sender.broadcast(torch.zeros(8, dtype=torch.uint8))
        assert 0.5 <= time.monotonic() - started < 5.0
        assert len(recorded.of(0, "destroy")) == 1
        with pytest.raises(RuntimeError, match="has been left"):
            sender.broadcast(torch.zeros(8, dtype=torch.uint8))
        assert len(recorded.of(0, "broadcast")) == 1


def test_a_broadcast_that_an_abort_lets_go_is_not_taken_for_one_that_arrived(recorded: RecordingNccl) -> None:
    recorded.absent.add(0)
    with group(rendezvous(2)) as (_, receiver), ThreadPoolExecutor(1) as executor:
        call = executor.submit(receiver.broadcast, torch.zeros(8, dtype=torch.uint8))
        while not recorded.of(1, "broadcast"):
            time.sleep(0.001)
        receiver.abort()
        with pytest.raises(RuntimeError, match="a broadcast of 8 bytes over nccl did not take place"):
            call.result(5.0)


def test_an_abort_frees_the_caller_also_of_a_call_that_it_does_not_end(
    recorded: RecordingNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, forever = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        called.set()
        forever.wait()

    monkeypatch.setattr(Communicator, "broadcast", hang)
    with group(rendezvous(2)) as (sender, _), ThreadPoolExecutor(1) as executor:
        call = executor.submit(sender.broadcast, torch.zeros(8, dtype=torch.uint8))
        assert called.wait(5.0)
        sender.abort()
        with pytest.raises(RuntimeError, match="has been left"):
            call.result(5.0)
    forever.set()


def test_aborts_at_the_same_moment_free_the_group_once(recorded: RecordingNccl) -> None:
    with group(rendezvous(2)) as (sender, _):
        together = threading.Barrier(8)

        def abort() -> None:
            together.wait()
            sender.abort()

        with ThreadPoolExecutor(8) as executor:
            for call in [executor.submit(abort) for _ in range(8)]:
                call.result()
    assert len(recorded.of(0, "destroy")) == 1


def test_a_library_call_that_never_returns_does_not_hold_its_caller(
    recorded: RecordingNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever = threading.Event()
    monkeypatch.setattr(nccl, "PyNcclCommunicator", lambda *_: forever.wait())
    meeting = rendezvous(2, timeout_s=0.5)
    with ThreadPoolExecutor(2) as executor:
        calls = [executor.submit(join, meeting, rank, CPU) for rank in range(2)]
        for call in calls:
            with pytest.raises(TimeoutError, match=r"joining the group over nccl took longer than 0\.5 s"):
                call.result(10.0)
    hanging = [thread for thread in threading.enumerate() if thread.name == "nccl"]
    forever.set()
    assert len(hanging) == 2 and all(thread.daemon for thread in hanging)  # the process could end


def test_a_group_that_is_joined_after_the_deadline_is_freed(
    recorded: RecordingNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone_on = threading.Event()

    def slowly(*arguments: Any) -> Communicator:
        gone_on.wait()
        return recorded.communicator(*arguments)

    monkeypatch.setattr(nccl, "PyNcclCommunicator", slowly)
    meeting = rendezvous(2, timeout_s=0.3)
    with ThreadPoolExecutor(2) as executor:
        calls = [executor.submit(join, meeting, rank, CPU) for rank in range(2)]
        for call in calls:
            with pytest.raises(TimeoutError):
                call.result(10.0)
        gone_on.set()
    deadline = time.monotonic() + 10.0
    while {call.rank for call in recorded.calls if call.name == "destroy"} != {0, 1}:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_nccl_says_reaches_the_caller(recorded: RecordingNccl) -> None:
    recorded.fails = RuntimeError("NCCL error: remote process exited or there was a network error")
    with group(rendezvous(2)) as (sender, _), pytest.raises(RuntimeError, match="remote process exited"):
        sender.broadcast(torch.zeros(8, dtype=torch.uint8))


def test_an_nccl_that_is_not_there_is_an_error_and_not_a_push_of_nothing(recorded: RecordingNccl) -> None:
    recorded.disabled = True
    with pytest.raises(RuntimeError, match=r"vLLM finds no nccl.*weight_sync\.backend = gloo"), group(rendezvous(2)):
        pass


class Steps:
    """What happened in which thread, in order."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, object]] = []
        self.threads: set[int] = set()

    def take(self, name: str, what: object = None) -> None:
        self.taken.append((name, what))
        self.threads.add(threading.get_ident())

    @contextmanager
    def around(self, name: str, what: object = None) -> Iterator[None]:
        self.take(name, what)
        yield
        self.take(f"end of {name}")


def test_every_call_is_made_on_the_channel_s_device_after_all_work_on_it(
    recorded: RecordingNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, cuda = Steps(), torch.device("cuda:3")
    record = recorded.record

    def noting(call: Call) -> None:
        steps.take(call.name)
        record(call)

    monkeypatch.setattr(recorded, "record", noting)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: steps.around("device", index))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: steps.take("synchronize", device))
    monkeypatch.setattr(nccl, "current_stream", lambda: SimpleNamespace(synchronize=lambda: steps.take("arrived")))
    channel = join(rendezvous(1), 0, cuda)
    assert steps.taken == [("device", 3), ("init", None), ("end of device", None)]
    steps.taken.clear()
    steps.threads.clear()
    channel.broadcast(torch.zeros(8, dtype=torch.uint8))
    between = [("synchronize", cuda), ("broadcast", None), ("arrived", None)]
    assert steps.taken == [("device", 3), *between, ("end of device", None)]
    assert len(steps.threads) == 1 and threading.get_ident() not in steps.threads


def test_the_group_is_made_without_the_settings_that_vllm_pins_for_its_own(
    recorded: RecordingNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps()

    def make(*arguments: Any) -> Communicator:
        steps.take("made")
        return recorded.communicator(*arguments)

    monkeypatch.setattr(nccl, "unpinned_nccl_env", lambda: steps.around("unpinned"))
    monkeypatch.setattr(nccl, "PyNcclCommunicator", make)
    join(rendezvous(1), 0, CPU).abort()
    assert [name for name, _ in steps.taken] == ["unpinned", "made", "end of unpinned"]
