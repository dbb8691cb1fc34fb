"""The bytes of a push: what one end packs the other unpacks, over a real gloo group."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from services.startup import free_port
from services.weight_transfer import gloo, trainer_engine
from services.weight_transfer.plugin import register
from services.weight_transfer.source import CheckpointSource
from tests.models import save_model

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).to(torch.bfloat16),  # 14 bytes: what follows is not aligned to 4
    "c": torch.randn(2, 2, 2),
    "d": torch.arange(5),
    "e": torch.randn(4, 6).t(),  # not contiguous
}
PARAMETERS = [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in TENSORS.items()]


@pytest.mark.parametrize("bucket_bytes", [1, 80, 10_000])
def test_what_is_packed_is_unpacked(bucket_bytes: int) -> None:
    tensors, found = iter(TENSORS.items()), {}
    for bucket in gloo.cut_into_buckets(PARAMETERS, bucket_bytes):
        assert len(bucket) == 1 or sum(map(gloo.num_bytes, bucket)) <= bucket_bytes
        found |= dict(gloo.unpack(gloo.pack(bucket, tensors), bucket))
    assert list(found) == list(TENSORS)
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in TENSORS)


def test_a_source_that_yields_something_else_is_an_error() -> None:
    (bucket,) = gloo.cut_into_buckets(PARAMETERS[:2], 10_000)
    for items in (
        [("a", torch.zeros(3, 4))],
        [("x", TENSORS["a"])],
        [("a", TENSORS["a"].double())],
        [("a", TENSORS["a"])],
    ):
        with pytest.raises(ValueError, match="where its metadata announces"):
            gloo.pack(bucket, iter(items))


def test_bytes_and_digest_travel_through_a_group() -> None:
    port = free_port("127.0.0.1", 0)
    packed = torch.randint(0, 256, (1000,), dtype=torch.uint8)

    def end(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = gloo.join_group("127.0.0.1", port, rank, 2, timeout_s=20.0)
        mine = packed if rank == 0 else torch.zeros_like(packed)
        digest = gloo.digest_of(packed) if rank == 0 else torch.zeros(16, dtype=torch.uint8)
        gloo.broadcast(group, mine)
        gloo.broadcast(group, digest)
        group.abort()
        return mine, digest

    with ThreadPoolExecutor(2) as executor:
        _, (received, digest) = executor.map(end, range(2))
    assert torch.equal(received, packed) and torch.equal(digest, gloo.digest_of(received))
    damaged = received.clone()
    damaged[500] ^= 1
    assert not torch.equal(gloo.digest_of(damaged), digest)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_weights_leave_under_checkpoint_names_in_the_rollouts_dtype(architecture: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = save_model(tmp_path, architecture)
    saved = load_file(f"{folder}/model.safetensors")
    source = CheckpointSource(AutoModelForCausalLM.from_pretrained(folder), torch.bfloat16)
    sent = dict(source)
    assert set(sent) == set(saved) and ("lm_head.weight" in sent) == (architecture == "llama")
    assert all(torch.equal(sent[name], saved[name].bfloat16()) for name in saved)
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [(n, t.dtype, tuple(t.shape)) for n, t in source]


def test_registering_twice_is_harmless() -> None:
    register()
    register()
    assert "gloo" in WeightTransferEngineFactory._registry and "gloo" in WeightTransferTrainerFactory._registry


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_both_backends_go_through_vllms_factory(backend: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    captured = {}
    monkeypatch.setattr(
        WeightTransferTrainerFactory, "trainer_init", lambda info, **rest: captured.update(info=info, **rest)
    )
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "llama"))
    trainer_engine.build(
        backend,
        "the control client",  # type: ignore[arg-type]
        model,
        dtype=torch.bfloat16,
        address="10.0.0.1",
        port=7,
        world_size=3,
        timeout_s=5.0,
        bucket_bytes=99,
    )
    info = captured["info"]
    assert (info.backend, info.master_address, info.master_port, info.world_size) == (backend, "10.0.0.1", 7, 3)
    assert (info.bucket_bytes if backend == "gloo" else info.packed_buffer_size_bytes) == 99 and info.is_sender
    assert captured["client"] == "the control client" and isinstance(captured["source"], CheckpointSource)
