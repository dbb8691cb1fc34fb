"""The arithmetic of a GPU's memory, against numbers worked out by hand."""

from dataclasses import replace
from typing import Any

from services.gpus.memory import (
    GIB,
    Share,
    Shrinkable,
    Sizes,
    kv_bytes_per_token,
    teacher_share,
    usable_bytes,
    vllm_share,
)
from services.models.shape import ModelShape
from tests.unit.services.shapes import QWEN3_0_6B

SIZES = Sizes(max_model_len=1024)


def vllm(**changes: Any) -> Share:
    arguments: dict[str, Any] = {"num_gpus": 1, "kv_tokens": 1024} | changes
    return vllm_share(QWEN3_0_6B, "bfloat16", SIZES, 24 * GIB, **arguments)


def test_a_token_of_the_cache_is_keys_and_values_of_all_layers() -> None:
    assert kv_bytes_per_token(QWEN3_0_6B, "bfloat16") == 2 * 28 * 8 * 128 * 2 == 114_688
    assert kv_bytes_per_token(QWEN3_0_6B, "float32") == 229_376


def test_a_longer_sequence_than_a_micro_batch_stands_alone() -> None:
    long = Sizes(max_model_len=8192, tokens_per_micro_batch=1024, tokens_per_forward=1024)
    teachers = [teacher_share(QWEN3_0_6B, "bfloat16", s) for s in (long, replace(long, tokens_per_forward=8192))]
    assert teachers[0] == teachers[1]


def test_vllm_spreads_weights_and_cache_over_its_gpus() -> None:
    one, two = vllm(), vllm(num_gpus=2)
    assert one.parameters == 2 * QWEN3_0_6B.num_parameters and one.kv_cache == 1024 * 114_688
    assert (2 * two.parameters, 2 * two.kv_cache, two.other) == (one.parameters, one.kv_cache, one.other)
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
    assert teacher_share(quantised, "bfloat16", SIZES).parameters == 10**9


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
