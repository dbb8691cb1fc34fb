"""A push from the trainer's source into the workers' models, and what must be found before it is finished."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from services.errors import WeightSyncError
from services.weight_transfer.channel import Update
from services.weight_transfer.sender import check_arrival
from tests.unit.services.weight_transfer.pushes import (
    NUM_LAYERS,
    Parameters,
    Report,
    Source,
    Stalled,
    a_small_step,
    assert_holds,
    connected,
    push,
    random_weights,
)


@pytest.mark.parametrize("bucket_bytes", [1, 200, 10_000])
def test_every_push_reaches_all_workers_bit_by_bit(bucket_bytes: int) -> None:
    sender, workers, wire = connected(num_workers=2, bucket_bytes=bucket_bytes)
    for seed in range(3):
        weights = random_weights(seed)
        reports = push(sender, workers, Source(weights))
        for worker, report in zip(workers, reports, strict=True):
            worker.finish_weight_update(f"{seed}.0@run")
            assert_holds(worker, weights)
            assert (worker.label, worker.state) == (f"{seed}.0@run", "none")
            assert report["parameters_received"] == len(weights) and report["missing"] == []
            assert report["bytes_received"] == sum(map(torch.Tensor.numel, wire.sent))
        wire.sent.clear()


@pytest.mark.parametrize("withheld", list(random_weights(0)))
def test_a_parameter_that_was_withheld_is_named_whatever_it_is_part_of(withheld: str) -> None:
    sender, workers, _ = connected()
    weights = {name: tensor for name, tensor in random_weights(1).items() if name != withheld}
    with pytest.raises(WeightSyncError, match=rf"^worker 0 of http://a: no weights came for {withheld}$"):
        push(sender, workers, Source(weights))
    with pytest.raises(RuntimeError, match=f"no weights came for {withheld}"):
        workers[0].finish_weight_update("1.0@run")
    assert workers[0].label is None


def test_no_fault_of_twenty_passes_after_a_small_step_in_half_precision() -> None:
    """The least that a step may change: the canary would see none of these."""
    randoms, before = random.Random(0), random_weights(0)
    for kind in (withhold, repeat, flip):
        for seed in range(20):
            sender, workers, wire = connected()
            push(sender, workers, Source(before))
            workers[0].finish_weight_update("0.0@run")
            old, after = wire.sent[:], a_small_step(before, seed)
            wire.sent.clear()
            source = kind(randoms, after, old, wire)
            with pytest.raises(WeightSyncError, match=r"^worker 0 of http://a: .*(did not arrive|no weights came for)"):
                push(sender, workers, source)


def withhold(randoms: random.Random, weights: Parameters, old: list[torch.Tensor], wire: Any) -> Source:
    left_out = randoms.choice(list(weights))
    return Source({name: tensor for name, tensor in weights.items() if name != left_out})


def repeat(randoms: random.Random, weights: Parameters, old: list[torch.Tensor], wire: Any) -> Source:
    chosen = randoms.randrange(len(old))
    wire.damage = lambda buffer, index: buffer.copy_(old[index]) if index == chosen else None
    return Source(weights)


def flip(randoms: random.Random, weights: Parameters, old: list[torch.Tensor], wire: Any) -> Source:
    # Every parameter here is a multiple of 8 bytes, and its first byte is never padding.
    chosen, bit = randoms.randrange(len(old)), 1 << randoms.randrange(8)
    place = randoms.randrange(old[chosen].numel() // 16) * 16 + randoms.randrange(8)

    def damage(buffer: torch.Tensor, index: int) -> None:
        if index == chosen:
            buffer[place] ^= bit

    wire.damage = damage
    return Source(weights)


def test_a_buffer_that_was_not_packed_anew_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, workers, _ = connected()
    push(sender, workers, Source(random_weights(0)))
    workers[0].finish_weight_update("0.0@run")
    # The bytes of the push before, which are in the buffer still.
    monkeypatch.setattr(sender, "_pack", lambda channel, index, bucket, tensors: sender._buffers.of(index, bucket))
    with pytest.raises(WeightSyncError, match="did not arrive as they were sent"):
        push(sender, workers, Source(random_weights(1)))


def test_a_source_that_is_read_while_it_changes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, workers, _ = connected()
    weights = random_weights(0)
    pack = sender._pack

    def pack_and_change(channel: Any, index: int, bucket: Any, tensors: list[torch.Tensor]) -> Any:
        packed = pack(channel, index, bucket, tensors)
        tensors[0].view(-1)[0] += 1.0
        return packed

    monkeypatch.setattr(sender, "_pack", pack_and_change)
    with pytest.raises(WeightSyncError, match="did not arrive as they were sent"):
        push(sender, workers, Source(weights))


@pytest.mark.parametrize(
    "changed",
    [
        lambda weights: weights | {"extra": torch.zeros(1)},
        lambda weights: {n: t for n, t in weights.items() if n != "norm.weight"},
        lambda weights: weights | {"norm.weight": torch.zeros(3, dtype=torch.bfloat16)},
        lambda weights: weights | {"norm.weight": weights["norm.weight"].float()},
    ],
    ids=["too many", "too few", "another shape", "another dtype"],
)
def test_a_source_that_yields_what_it_did_not_announce_ends_the_push_on_both_ends(
    changed: Callable[[Parameters], Parameters],
) -> None:
    sender, workers, _ = connected()
    weights = random_weights(0)
    with pytest.raises((ValueError, RuntimeError), match=r"metadata announces|peer is gone"):
        push(sender, workers, Source(changed(weights), announced=weights))
    assert sender._channel is None
    with pytest.raises(RuntimeError, match="no worker has joined: connect first"):
        sender.send(Source(weights))


def test_a_lone_tensor_is_sent_from_where_it_is() -> None:
    sender, workers, _ = connected(bucket_bytes=1)
    weights, sent = random_weights(0), []
    channel: Any = sender._channel
    broadcast = channel.broadcast
    channel.broadcast = lambda buffer: sent.append(buffer.data_ptr()) or broadcast(buffer)
    push(sender, workers, Source(weights))
    assert sent[0] == weights["embed.weight"].data_ptr() and sent[-1] == weights["norm.weight"].data_ptr()
    assert sent[1] == sent[3] and sent[2] not in sent[:2]
    assert len(sent) == 2 + NUM_LAYERS


def test_a_buffer_is_not_packed_again_before_it_was_sent() -> None:
    sender, workers, wire = connected(bucket_bytes=1)
    wire.delay_s = 0.03
    push(sender, workers, Source(random_weights(0)))


def test_a_worker_that_is_lost_in_the_last_broadcast_fails_the_push() -> None:
    sender, _, wire = connected(bucket_bytes=1)
    weights = random_weights(0)

    def fail(buffer: torch.Tensor, index: int) -> None:
        if index == 4:
            raise RuntimeError("a peer is gone")

    wire.damage = fail
    with pytest.raises(RuntimeError, match="a peer is gone"):
        sender.send(Source(weights))
    assert len(wire.sent) == 4


def test_a_push_that_stalls_ends_at_the_deadline_of_the_stage() -> None:
    sender, (worker,), _ = connected()
    source = Source(random_weights(0))
    sender._timeout_s = 0.2
    sender._attach(Stalled())
    with pytest.raises(
        TimeoutError, match=r"sending the weights took longer than weight_sync\.stage_timeout_s = 0\.2 s"
    ):
        sender.send(source)
    worker.start_weight_update()
    worker._attach(Stalled(), 0.2)
    with pytest.raises(TimeoutError, match="receiving the weights took longer"):
        worker.receive_weights(sender.update(source))
    assert not worker.is_connected


def test_a_sender_that_is_aborted_from_another_thread_ends_at_once() -> None:
    sender, _, _ = connected()
    stalled = Stalled()
    sender._attach(stalled)
    with ThreadPoolExecutor(1) as executor:
        sending = executor.submit(sender.send, Source(random_weights(0)))
        assert stalled.begun.wait(10.0)
        sender.abort()
        assert isinstance(sending.exception(timeout=10.0), RuntimeError)


UPDATE_REPORT = {"problem": None, "checksums": ["a", "b"], "missing": [], "bytes_received": 1, "parameters_received": 2}


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({"checksums": ["a", "c"]}, r"worker 1 of http://b: norm.weight did not arrive as they were sent"),
        ({"checksums": ["c", "b"]}, "the parameters from x to y did not arrive"),
        ({"checksums": ["a"]}, "worker 1 of http://b: its report has no checksum for each of the 2 buckets"),
        ({"checksums": None}, "no checksum for each"),
        ({"missing": None}, "does not say which parameters are missing"),
        ({"missing": [f"p{i}" for i in range(10)]}, "no weights came for p0, p1, p2, p3, p4, p5, p6, p7 and 2 more"),
        ({"problem": "TimeoutError: late"}, "worker 1 of http://b: TimeoutError: late"),
    ],
)
def test_an_error_of_arrival_names_server_worker_and_tensors(report: Report, said: str) -> None:
    update = Update(["x", "y", "norm.weight"], ["float32"] * 3, [[4], [4], [8]], 32)
    check_arrival(update, ["a", "b"], [[UPDATE_REPORT], [UPDATE_REPORT] * 2], ["http://a", "http://b"])
    reports = [[UPDATE_REPORT], [UPDATE_REPORT, UPDATE_REPORT | report]]
    with pytest.raises(WeightSyncError, match=said):
        check_arrival(update, ["a", "b"], reports, ["http://a", "http://b"])


def test_a_server_that_reports_of_no_worker_has_received_nothing() -> None:
    with pytest.raises(WeightSyncError, match="http://a reports of no worker"):
        check_arrival(Update([], [], [], 1), [], [[]], ["http://a"])
