"""The channel over nccl between two processes and two GPUs: bytes, order, and the end of a broadcast that misses its peer.

Run on a machine with two NVIDIA GPUs: `make test ARGS="-m gpu"`.
"""

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from threading import Timer

import pytest
import torch

from services.weight_transfer.channel import Rendezvous
from services.weight_transfer.nccl import NcclChannel
from tests.nccl_group import join, rendezvous

pytestmark = pytest.mark.gpu

NUM_BYTES = 256 << 20
SENDER, RECEIVER = torch.device("cuda:0"), torch.device("cuda:1")


def receive(meeting: Rendezvous, ours: Connection) -> None:
    """The other process: receives as often as it is told, and answers with a hash of what came."""
    channel = join(meeting, 1, RECEIVER)
    buffer = torch.empty(NUM_BYTES, dtype=torch.uint8, device=RECEIVER)
    ours.send(os.getpid())
    while ours.recv():
        channel.broadcast(buffer)
        ours.send(digest(buffer))
    channel.abort()


def digest(buffer: torch.Tensor) -> str:
    return hashlib.sha256(buffer.cpu().numpy()).hexdigest()


@contextmanager
def connected(timeout_s: float = 60.0) -> Iterator[tuple[NcclChannel, Connection, int]]:
    """The sender's channel, the way to the receiver, and its process id."""
    meeting, context = rendezvous(2, timeout_s), multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=receive, args=(meeting, theirs))
    process.start()
    channel = join(meeting, 0, SENDER)
    try:
        yield channel, ours, ours.recv()
    finally:
        channel.abort()
        process.kill()
        process.join()


def random_bytes() -> torch.Tensor:
    return torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8, device=SENDER)


def test_bytes_arrive_as_they_are_after_all_work_on_the_gpu() -> None:
    """A broadcast that did not wait would send zeros, for a second's work comes before the bytes, on another stream."""
    with connected() as (channel, receiver, _):
        for _ in range(5):
            final = random_bytes()
            buffer, busy = torch.zeros_like(final), torch.randn(8192, 8192, device=SENDER)
            torch.cuda.synchronize(SENDER)
            receiver.send(True)
            with torch.cuda.stream(torch.cuda.Stream(SENDER)):
                for _ in range(50):
                    busy = busy @ busy
                    busy /= busy.norm()
                buffer.copy_(final)
            channel.broadcast(buffer)
            assert receiver.recv() == digest(final)
        receiver.send(False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_receiver_that_is_gone_ends_the_broadcast_and_a_new_group_works(number: signal.Signals) -> None:
    with connected(timeout_s=5.0) as (channel, _, process_id):
        os.kill(process_id, number)
        started = time.monotonic()
        with pytest.raises((TimeoutError, RuntimeError)):
            channel.broadcast(random_bytes())
        assert time.monotonic() - started < 15.0
        torch.cuda.synchronize(SENDER)  # no kernel is left behind
    with connected() as (channel, receiver, _):
        sent = random_bytes()
        receiver.send(True)
        channel.broadcast(sent)
        assert receiver.recv() == digest(sent)
        receiver.send(False)


def test_an_abort_from_another_thread_ends_a_broadcast() -> None:
    with connected() as (channel, _, _):
        started = time.monotonic()
        Timer(1.0, channel.abort).start()
        with pytest.raises(RuntimeError, match="has been left"):
            channel.broadcast(random_bytes())
        assert time.monotonic() - started < 15.0
        torch.cuda.synchronize(SENDER)
