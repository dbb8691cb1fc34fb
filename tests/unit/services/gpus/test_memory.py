"""The arithmetic of a GPU's memory, against numbers worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from services.gpus.memory import (
    GIB,
    Share,
    Shrinkable,
    Sizes,
    kv_bytes_per_token,
    teacher_share,
    trainer_share,
    usable_bytes,
    vllm_share,
)
from services.models.shape import ModelShape
from tests.unit.services.shapes import QWEN3_0_6B

SIZES = Sizes(max_model_len=1024)
TRAINING: dict[str, Any] = {"master_dtype": "float32", "rollout_dtype": "bfloat16", "bucket_bytes": 1 << 20}


def trainer(
    sizes: Sizes = SIZES, compute: str = "bfloat16", checkpointing: bool = True, master: str = "float32"
) -> Share:
    options = TRAINING | {"master_dtype": master}
    return trainer_share(QWEN3_0_6B, sizes, compute_dtype=compute, checkpointing=checkpointing, **options)


def vllm(**changes: Any) -> Share:
    arguments: dict[str, Any] = {"num_gpus": 1, "kv_tokens": 1024} | changes
    return vllm_share(QWEN3_0_6B, "bfloat16", SIZES, 24 * GIB, **arguments)


def test_a_token_of_the_cache_is_keys_and_values_of_all_layers() -> None:
    assert kv_bytes_per_token(QWEN3_0_6B, "bfloat16") == 2 * 28 * 8 * 128 * 2 == 114_688
    assert kv_bytes_per_token(QWEN3_0_6B, "float32") == 229_376


def test_training_keeps_16_bytes_a_parameter() -> None:
    share = trainer()
    assert share.weights + share.training == 16 * QWEN3_0_6B.num_parameters == pytest.approx(9.54e9, rel=1e-3)
    half = trainer(master="bfloat16")
    assert half.weights + half.training == 8 * QWEN3_0_6B.num_parameters


def test_the_head_adds_two_gradients_of_the_embedding() -> None:
    assert trainer().head > 2 * 4 * 151_936 * 1024 == pytest.approx(1.24e9, rel=1e-2)


def per_token(**options: Any) -> float:
    """Bytes of activations of one more token of a micro-batch."""
    large, small = (trainer(replace(SIZES, tokens_per_micro_batch=n), **options).activations for n in (32768, 16384))
    return float((large - small) / 16384)


def test_activations_are_those_counted_in_the_sources() -> None:
    """72 kB a token and layer in bfloat16, 123 kB in float32 with scores of 16 heads; checkpointed 4 kB and one layer."""
    one_layer = (per_token(checkpointing=False) - per_token()) / 28
    assert per_token(checkpointing=False) / 30 == pytest.approx(72e3, rel=0.02)
    assert per_token() == pytest.approx(28 * 4096 + 2 * 72e3, rel=0.02) and one_layer > 60e3
    assert per_token(compute="float32", checkpointing=False) / 30 == pytest.approx(123e3 + 4 * 16 * 1024, rel=0.03)


def test_autocast_keeps_a_copy_of_the_weights() -> None:
    tokens = replace(SIZES, tokens_per_micro_batch=1024)
    copies = trainer(tokens).activations - 1024 * per_token()
    assert copies == pytest.approx(2 * QWEN3_0_6B.num_parameters, rel=1e-3)
    assert trainer(tokens, compute="float32").activations < 2 * QWEN3_0_6B.num_parameters


def test_a_longer_sequence_than_a_micro_batch_stands_alone() -> None:
    long = Sizes(max_model_len=8192, tokens_per_micro_batch=1024, tokens_per_forward=1024)
    assert trainer(long).activations == trainer(replace(long, tokens_per_micro_batch=8192)).activations
    teachers = [teacher_share(QWEN3_0_6B, "bfloat16", s) for s in (long, replace(long, tokens_per_forward=8192))]
    assert teachers[0] == teachers[1]


def test_vllm_spreads_weights_and_cache_over_its_gpus() -> None:
    one, two = vllm(), vllm(num_gpus=2)
    assert one.weights == 2 * QWEN3_0_6B.num_parameters and one.kv_cache == 1024 * 114_688
    assert (2 * two.weights, 2 * two.kv_cache, two.other) == (one.weights, one.kv_cache, one.other)
    assert vllm(kv_tokens=None).kv_cache == 1024 * 114_688  # one sequence, without which vLLM does not start


def test_scoring_in_vllm_holds_logits_of_prompts() -> None:
    assert vllm(scores_prompts=True).head - vllm().head == 1024 * 151_936 * 4 * 4


def test_rows_of_a_head_chunk_are_bounded_as_in_the_teacher() -> None:
    shares = [
        teacher_share(QWEN3_0_6B, "bfloat16", replace(SIZES, rows_per_head_chunk=n)) for n in (64, 128, 1024, 4096)
    ]
    assert shares[1].head == 2 * shares[0].head == 5 * 4 * 128 * 151_936
    assert shares[2].head == shares[3].head == 5 * 4 * (64 << 20)


def test_quantised_weights_count_as_they_are_stored() -> None:
    quantised: ModelShape = replace(QWEN3_0_6B, stored_bytes=10**9)
    assert teacher_share(quantised, "bfloat16", SIZES).weights == 10**9


def test_something_is_left_for_the_driver() -> None:
    assert 0.95 * 24 * GIB < usable_bytes(24 * GIB) < 24 * GIB


def test_a_size_is_halved_to_its_floor() -> None:
    size = Shrinkable("tokens_per_micro_batch", start=16384, comfortable=4096, floor=1000)
    sizes, seen = Sizes(max_model_len=1), [16384]
    while (smaller := size.halve(sizes, to_floor=True)) is not None:
        sizes = smaller
        seen.append(sizes.tokens_per_micro_batch)
    assert seen == [16384, 8192, 4096, 2048, 1024, 1000]
    assert size.halve(replace(sizes, tokens_per_micro_batch=4096), to_floor=False) is None
