"""The arithmetic of a rank of the trainer, against numbers worked out by hand; against real tensors it is compared in
tests/unit/trainer/test_rank_memory.py."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from services.config import RunConfig
from services.gpus.memory import PROCESS, Share, Sizes
from services.gpus.trainer_memory import HostMemory, Layout, host_memory, trainer_share
from services.models.shape import ModelShape
from tests.unit.services.shapes import QWEN3_0_6B

SIZES = Sizes(max_model_len=1024, tokens_per_micro_batch=16384)
ONE = Layout()
TWO = replace(ONE, num_ranks=2, num_local_ranks=2, shard_degree=2)
EIGHT = replace(ONE, num_ranks=8, num_local_ranks=8, shard_degree=8)
PARAMETERS, EMBEDDING = 596_049_920, 151_936 * 1024
LAYER = (PARAMETERS - EMBEDDING - 1024) // 28
UNTIED = replace(QWEN3_0_6B, is_tied=False, tensors=(*QWEN3_0_6B.tensors, (1, 151_936, 1024)))
# Three layers of 10 x 4 and a vocabulary of 5: rows that two ranks share evenly, and rows that they do not.
ODD = replace(QWEN3_0_6B, num_layers=3, hidden_size=4, vocab_size=5, tensors=((1, 5, 4), (3, 10, 4), (1, 4, 1)))


def trainer(layout: Layout = ONE, sizes: Sizes = SIZES, shape: ModelShape = QWEN3_0_6B) -> Share:
    return trainer_share(shape, sizes, layout, bucket_bytes=1 << 20)


def test_one_rank_keeps_16_bytes_a_parameter() -> None:
    share = trainer()
    assert (share.parameters, share.gradients, share.optimizer) == tuple(n * PARAMETERS for n in (4, 4, 8))
    half = trainer(replace(ONE, master_dtype="bfloat16"))
    assert half.parameters + half.gradients + half.optimizer == 8 * PARAMETERS


def test_ranks_that_hold_a_copy_together_keep_their_part_of_it() -> None:
    share, four = trainer(EIGHT), trainer(replace(EIGHT, shard_degree=4))
    assert share.parameters + share.gradients + share.optimizer == 16 * PARAMETERS // 8
    assert 4 * share.parameters == 2 * four.parameters == 2 * PARAMETERS


def test_rows_that_cannot_be_shared_evenly_are_filled_up() -> None:
    assert ODD.num_parameters == 5 * 4 + 3 * 10 * 4 + 4 == 144
    assert [ODD.shard_parameters(n) for n in (1, 2, 3, 7)] == [
        144,
        3 * 4 + 3 * 5 * 4 + 2,
        2 * 4 + 3 * 4 * 4 + 2,
        1 * 4 + 3 * 2 * 4 + 1,
    ]
    assert trainer(replace(EIGHT, num_ranks=2, shard_degree=2), shape=ODD).parameters == 4 * 74


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    share, offloaded = trainer(EIGHT), trainer(replace(EIGHT, cpu_offload=True))
    assert offloaded == replace(share, parameters=0, gradients=0, optimizer=0)


def test_the_head_in_bfloat16() -> None:
    """2 bytes of embedding and norm, 4 of the sum of the weight's gradients, 2 of that sum rounded; hidden states in bfloat16
    and sums of their gradients; a tile."""
    expected = 8 * EMBEDDING + 2 * 1024 + 6 * 16384 * 1024 + 4 * 2**26
    assert trainer().head == trainer(EIGHT).head == expected == pytest.approx(1.61e9, rel=1e-2)
    assert trainer(shape=UNTIED).head == expected + 2 * EMBEDDING  # two matrices are gathered
    assert trainer(replace(ONE, on_gpu=False)).head == expected - 4 * 2**26 + 4 * 2**23


def test_the_head_in_float32() -> None:
    """Nothing is rounded; one rank alone gathers nothing."""
    plain = replace(ONE, compute_dtype="float32")
    expected = 4 * EMBEDDING + 8 * 16384 * 1024 + 4 * 2**26
    assert trainer(plain).head == expected
    assert trainer(replace(EIGHT, compute_dtype="float32")).head == expected + 4 * (EMBEDDING + 1024)


def test_the_head_of_few_tokens_has_wide_tiles() -> None:
    """As wide as the vocabulary: the product of a tile is a gradient of the whole weight, in float32."""
    few = trainer(sizes=Sizes(max_model_len=8, tokens_per_micro_batch=8)).head
    gradients = 4 * EMBEDDING + 4 * (EMBEDDING + 8 * 1024)
    assert few == 2 * (EMBEDDING + 1024) + gradients + 6 * 8 * 1024 + 4 * 8 * 151_936


def test_the_head_of_a_small_weight_takes_most_in_the_forward_pass() -> None:
    """Two tiles, and what a product needs in float32: hidden states and weight."""
    small = replace(QWEN3_0_6B, hidden_size=64, tensors=((1, 151_936, 64), (1, 64, 1)))
    columns = 2**26 // 4096
    expected = 2 * (151_936 * 64 + 64) + 2 * 4 * 2**26 + 6 * 16384 * 64 + 4 * (4096 + columns) * 64
    assert trainer(shape=small).head == expected


def peak(layout: Layout, tokens: int = 16384, shape: ModelShape = QWEN3_0_6B) -> int:
    """Of what comes and goes."""
    share = trainer(layout, Sizes(max_model_len=1024, tokens_per_micro_batch=tokens), shape)
    return share.head + share.activations


def test_activations_are_those_that_a_layer_saves() -> None:
    """72 kB a token and layer in bfloat16, 123 kB in float32; checkpointed 2 kB, and twice that of one layer."""
    saved = {}
    for dtype in ("bfloat16", "float32"):
        layout = replace(ONE, compute_dtype=dtype, on_gpu=False)
        everything = replace(layout, checkpointing=False)
        of_token = (peak(everything, 32768) - peak(everything)) / 16384
        saved[dtype] = of_token / 30
        size = 2 if dtype == "bfloat16" else 4
        checkpointed = (peak(layout, 131072) - peak(layout, 65536)) / 65536
        assert checkpointed == pytest.approx(28 * size * 1024 + 2 * saved[dtype], rel=1e-3)
        assert saved[dtype] == pytest.approx(_saved_by_a_layer(getattr(torch, dtype)), rel=0.01)
    on_gpu = replace(ONE, compute_dtype="float32", checkpointing=False)
    of_token = (peak(on_gpu, 32768) - peak(on_gpu)) / 16384
    assert of_token / 30 - saved["float32"] == pytest.approx(4 * 16 * 1024)  # scores of 16 heads, up to 1024 tokens


def _saved_by_a_layer(dtype: torch.dtype) -> float:
    """Bytes a token that a layer of Qwen3-0.6B's size saves for its backward pass, counted."""
    num_tokens, saved = 64, {}
    config = Qwen3Config(
        num_hidden_layers=1,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=8,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hidden = torch.zeros(1, num_tokens, 1024, dtype=dtype, requires_grad=True)
    rotary = model.model.rotary_emb(hidden, torch.arange(num_tokens).unsqueeze(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model.layers[0](hidden, position_embeddings=rotary, attention_mask=None)
    assert output.requires_grad
    return sum(storage.nbytes() for place, storage in saved.items() if place not in own) / num_tokens


def test_a_layer_that_runs_is_gathered_with_the_next_one() -> None:
    """Where layers are larger than the head: 2 bytes each of two of them, 2 of gradients, 4 of those that are on their way;
    beside embedding and norm, and the head's gradient."""
    large = replace(QWEN3_0_6B, vocab_size=1000, tensors=((28, LAYER, 1), (1, 1000, 1024), (1, 1024, 1)))
    few = Sizes(max_model_len=1, tokens_per_micro_batch=1)
    outside = 2 * (1000 * 1024 + 1024) + 2 * 1000 * 1024
    of_token = 28 * 2 * 1024 + 2 * (8 * 3072 + 20 * 1024 + 9 * 3072)
    for layout in (TWO, EIGHT):
        share = trainer_share(large, few, layout, 0)
        assert share.head + share.activations == outside + of_token + (2 + 2 + 2 + 4) * LAYER
    share = trainer_share(large, few, replace(EIGHT, shard_degree=1), 0)
    assert share.head + share.activations == outside + of_token + (2 + 2 + 4) * LAYER


def test_inputs_of_layers_are_kept_beside_the_head() -> None:
    tokens = Sizes(max_model_len=1024, tokens_per_micro_batch=1024)
    assert trainer(EIGHT, tokens).activations == 1024 * 28 * 2 * 1024


def test_an_embedding_that_is_the_head_has_two_gradients_at_the_end() -> None:
    """In float32 without shards, beside all of the new buckets of DistributedDataParallel's second step."""
    layout = replace(EIGHT, shard_degree=1, compute_dtype="float32", on_gpu=False)
    assert peak(layout, tokens=1) == 4 * PARAMETERS + 2 * 4 * EMBEDDING


def test_gradients_are_there_twice_when_they_are_sent() -> None:
    """4 bytes beside the 2 that were computed; where a rank has everything, beside their sum and its copy."""
    root = 2 * EMBEDDING + 1024
    assert peak(replace(EIGHT, shard_degree=1), tokens=1, shape=UNTIED) == (4 + 8) * root
    for layout in (TWO, EIGHT):
        assert peak(replace(layout, on_gpu=False), tokens=1024, shape=UNTIED) == (4 + 2) * root


def test_the_buffers_of_a_push_take_turns_with_a_step() -> None:
    share = trainer_share(QWEN3_0_6B, SIZES, ONE, bucket_bytes=4 << 30)
    assert share.head + share.activations == (8 << 30) + 2 * EMBEDDING


def test_several_ranks_have_buffers_of_nccl() -> None:
    assert trainer().other == PROCESS < trainer(TWO).other == trainer(EIGHT).other


def test_a_longer_sequence_than_a_micro_batch_stands_alone() -> None:
    long = Sizes(max_model_len=8192, tokens_per_micro_batch=1024)
    assert trainer(sizes=long) == trainer(sizes=replace(long, tokens_per_micro_batch=8192))


@pytest.mark.parametrize(
    ("options", "on_gpu", "expected"),
    [
        ({}, True, replace(EIGHT, num_ranks=16)),
        ({"shard_degree": 16}, True, replace(EIGHT, num_ranks=16, shard_degree=16)),
        (
            {"parallelism": "ddp", "cpu_offload": True},
            True,
            replace(EIGHT, num_ranks=16, shard_degree=1, cpu_offload=True),
        ),
        (
            {"cpu_offload": True},
            False,
            replace(EIGHT, num_ranks=16, compute_dtype="float32", checkpointing=False, on_gpu=False),
        ),
    ],
)
def test_options_say_how_the_trainer_is_spread(options: dict[str, object], on_gpu: bool, expected: Layout) -> None:
    config = RunConfig(trainer=options, rollout={"dtype": "bfloat16"})
    assert Layout.of(config, 16, 8, on_gpu=on_gpu) == expected


def test_the_machine_holds_the_student_while_ranks_load_and_save() -> None:
    """In units of one parameter; ranks that compute on GPUs keep only the two copies in bfloat16 there."""
    units = {name: value * PARAMETERS for name, value in {"load": 4, "train": 4, "save": 8}.items()}
    assert host_memory(QWEN3_0_6B, EIGHT) == HostMemory(**units)
    assert host_memory(QWEN3_0_6B, TWO) == host_memory(QWEN3_0_6B, EIGHT)
    assert host_memory(QWEN3_0_6B, ONE) == HostMemory(load=4 * PARAMETERS, train=0, save=0)
    assert host_memory(QWEN3_0_6B, EIGHT).needed == 8 * PARAMETERS


def test_the_machine_holds_what_is_offloaded_or_computed_there() -> None:
    offloaded = host_memory(QWEN3_0_6B, replace(EIGHT, cpu_offload=True))
    units = {"load": 4 + 3.5, "train": 16 + 4, "save": 12 + 4 + 4}
    assert offloaded == HostMemory(**{name: int(value * PARAMETERS) for name, value in units.items()})
    assert host_memory(QWEN3_0_6B, replace(EIGHT, on_gpu=False)) == offloaded
    ddp = host_memory(QWEN3_0_6B, replace(EIGHT, shard_degree=1, on_gpu=False))
    assert ddp == HostMemory(load=32 * PARAMETERS, train=132 * PARAMETERS, save=100 * PARAMETERS)


def test_a_reference_is_held_beside_the_student_and_has_no_gradients() -> None:
    config = RunConfig(student={"model": "m"}, loss={"alpha_reference_kl": 0.1})
    with_one = Layout.of(config, 1, 1, on_gpu=False)
    without = replace(with_one, has_reference=False)
    part = without.shard_bytes(QWEN3_0_6B)
    shares = [trainer_share(QWEN3_0_6B, Sizes(64), layout, 1 << 20) for layout in (with_one, without)]
    assert shares[0].parameters - shares[1].parameters == part
    assert (shares[0].gradients, shares[0].optimizer) == (shares[1].gradients, shares[1].optimizer)
    hosts = [host_memory(QWEN3_0_6B, layout) for layout in (with_one, without)]
    assert [getattr(hosts[0], p) - getattr(hosts[1], p) for p in ("load", "train", "save")] == [part] * 3
    offloaded = replace(with_one, on_gpu=True)
    assert (
        host_memory(QWEN3_0_6B, offloaded).load == host_memory(QWEN3_0_6B, replace(offloaded, has_reference=False)).load
    )
