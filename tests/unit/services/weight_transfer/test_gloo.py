"""Bytes through a real gloo group, and its ends: a deadline, a peer that leaves, a peer that is killed."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroupGloo

from services.errors import WeightSyncError
from services.weight_transfer.buckets import checksum
from services.weight_transfer.channel import Rendezvous, stage_deadline
from services.weight_transfer.gloo import GlooChannel
from services.weight_transfer.rendezvous import await_workers, host_store, join_store
from services.weight_transfer.sender import check_arrival
from tests.loopbacks import available_loopbacks
from tests.unit.services.weight_transfer.gloo_worker import broadcast_once_and_stop
from tests.unit.services.weight_transfer.pushes import Source, assert_holds, random_weights, receiver, sender

CPU = torch.device("cpu")
LARGE = 32 << 20
"""More than the kernel takes over before the receiver reads."""


def join(rendezvous: Rendezvous, rank: int) -> GlooChannel:
    return GlooChannel(join_store(rendezvous), rendezvous, rank, CPU)


@contextmanager
def group(host: str = "127.0.0.1", num_workers: int = 1, timeout_s: float = 20.0) -> Iterator[list[GlooChannel]]:
    """The channels of the trainer and its workers."""
    store = host_store(host, 0, 20.0)
    rendezvous = Rendezvous(host, store.port, 1, 1 + num_workers, 20.0)
    late = replace(rendezvous, timeout_s=timeout_s)
    with ThreadPoolExecutor(num_workers) as executor:
        joining = [executor.submit(join, late, rank) for rank in range(1, 1 + num_workers)]
        channels = [GlooChannel(await_workers(store, rendezvous, Future()), late, 0, CPU)]
        channels += [worker.result() for worker in joining]
    try:
        yield channels
    finally:
        for channel in channels:
            channel.abort()


@pytest.mark.parametrize("host", available_loopbacks())
def test_bytes_arrive_at_every_worker(host: str) -> None:
    sent = torch.randint(0, 256, (100_001,), dtype=torch.uint8)
    with group(host, num_workers=2) as channels, ThreadPoolExecutor(3) as executor:
        received = [torch.zeros_like(sent) for _ in range(2)]
        list(executor.map(lambda channel, buffer: channel.broadcast(buffer), channels, [sent, *received]))
    assert all(checksum([buffer]) == checksum([sent]) for buffer in received)


def test_each_end_listens_on_the_address_that_leads_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on what the machine's name means, which may be 127.0.1.1."""
    made, create = [], ProcessGroupGloo.create_device
    monkeypatch.setattr(ProcessGroupGloo, "create_device", lambda hostname: made.append(hostname) or create(hostname))
    with group("127.0.0.3"):
        assert made == ["127.0.0.1", "127.0.0.1"] or made == ["127.0.0.3", "127.0.0.3"]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_abort_ends_a_broadcast_at_once_on_both_ends(rank: int) -> None:
    with group(num_workers=1, timeout_s=60.0) as channels:
        started = time.monotonic()
        with ThreadPoolExecutor(1) as executor:
            broadcast = executor.submit(channels[rank].broadcast, torch.zeros(LARGE, dtype=torch.uint8))
            time.sleep(0.2)
            channels[rank].abort()
            with pytest.raises(RuntimeError, match="has been left"):
                broadcast.result()
        buffer = torch.zeros(LARGE, dtype=torch.uint8)
        channels[1 - rank].broadcast(buffer)  # gloo brings to its end what has begun
        with pytest.raises(RuntimeError, match="a peer of this push was lost"):
            channels[1 - rank].broadcast(buffer)
        channels[rank].abort()
    assert time.monotonic() - started < 10.0


def test_a_broadcast_has_a_deadline() -> None:
    with group(timeout_s=0.3) as channels, pytest.raises(TimeoutError, match=r"took longer than 0\.3 s"):
        channels[1].broadcast(torch.zeros(8, dtype=torch.uint8))


def test_a_stage_has_a_deadline_over_all_its_broadcasts() -> None:
    with group(timeout_s=60.0) as channels:
        buffer = torch.zeros(8, dtype=torch.uint8)

        def trickle() -> None:
            for _ in range(100):
                channels[0].broadcast(torch.zeros(8, dtype=torch.uint8))
                time.sleep(0.05)

        with ThreadPoolExecutor(1) as executor:
            trickling = executor.submit(trickle)
            said = r"^receiving the weights took longer than weight_sync\.stage_timeout_s = 0\.5 s$"
            with pytest.raises(TimeoutError, match=said), stage_deadline(channels[1], "receiving the weights", 0.5):
                while True:
                    channels[1].broadcast(buffer)
            assert isinstance(trickling.exception(), RuntimeError)


def test_a_worker_that_is_killed_ends_the_broadcast_of_the_trainer() -> None:
    store = host_store("127.0.0.1", 0, 60.0)
    rendezvous = Rendezvous("127.0.0.1", store.port, 1, 2, 60.0)
    worker = multiprocessing.get_context("spawn").Process(target=broadcast_once_and_stop, args=(asdict(rendezvous),))
    worker.start()
    channel = GlooChannel(await_workers(store, rendezvous, Future()), rendezvous, 0, CPU)
    channel.broadcast(torch.zeros(8, dtype=torch.uint8))
    threading.Timer(0.2, worker.kill).start()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="a peer of this push was lost"):
        channel.broadcast(torch.zeros(LARGE, dtype=torch.uint8))
    assert time.monotonic() - started < 10.0
    channel.abort()
    worker.join()


def test_a_trainer_pushes_to_two_servers_again_and_again_over_one_port() -> None:
    port = host_store("127.0.0.1", 0, 5.0).port
    trainer, workers = sender(port), [receiver(), receiver()]

    def tell(rendezvous: dict[str, Any]) -> None:
        assert rendezvous["master_port"] == port
        with ThreadPoolExecutor(2) as executor:
            offsets = (1, 2)
            told = [Rendezvous(**{**rendezvous, "rank_offset": offset}) for offset in offsets]
            list(executor.map(lambda worker, place: worker.init_transfer_engine(place), workers, told))

    for seed in range(2):
        trainer.connect(tell, 3)
        source = Source(random_weights(seed))
        update = trainer.update(source)
        with ThreadPoolExecutor(2) as executor:
            for worker in workers:
                worker.start_weight_update()
            receiving = [executor.submit(worker.receive_weights, update) for worker in workers]
            checksums = trainer.send(source)
            for received in receiving:
                received.result()
        reports = [[asdict(worker.receipt)] for worker in workers]
        check_arrival(update, checksums, reports, ["http://a", "http://b"])
        for worker in workers:
            worker.finish_weight_update(f"{seed}.0@run")
            assert_holds(worker, random_weights(seed))
    trainer.abort()
    for worker in workers:
        worker.shutdown()


def test_a_server_that_refuses_ends_the_connecting() -> None:
    def refuse(rendezvous: dict[str, Any]) -> None:
        raise WeightSyncError("connect on http://a answered 409")

    trainer = sender(timeout_s=60.0)
    with pytest.raises(WeightSyncError, match="answered 409"):
        trainer.connect(refuse, 3)


def test_a_server_that_fails_after_its_workers_came_ends_the_connecting() -> None:
    worker = receiver()

    def join_and_fail(rendezvous: dict[str, Any]) -> None:
        worker.init_transfer_engine(Rendezvous(**rendezvous))
        raise WeightSyncError("connect on http://b answered 500")

    trainer = sender()
    with pytest.raises(WeightSyncError, match="answered 500"):
        trainer.connect(join_and_fail, 2)
    assert trainer._channel is None
    worker.shutdown()
