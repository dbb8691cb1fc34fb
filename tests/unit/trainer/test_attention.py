"""Packed rows against padded ones; the kernel itself needs a GPU (tests/gpu)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from services.config import RunConfig
from services.errors import ConfigError
from tests.unit.trainer.samples import BATCH
from tests.unit.trainer.sgd_learners import learner_of
from trainer import attention
from trainer.batch import pack
from trainer.student import load_student


def by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch's kernel computes, sequence after sequence; [T, heads, D]."""
    assert cu_seq_q.dtype == torch.int32 and int(cu_seq_q[-1]) == len(query) and window_size == (-1, 0)
    assert max_q == max_k == int(cu_seq_q.diff().max()) and torch.equal(cu_seq_q, cu_seq_k)
    lengths = cu_seq_q.diff().tolist()
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in of_one), is_causal=True, scale=scale, enable_gqa=enable_gqa
        ).transpose(0, 1)
        for of_one in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("limit", [10_000, 12])
def test_packed_rows_train_as_padded_ones_do(
    limit: int, tiny_model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(attention, "varlen_attn", lambda *a, **k: (calls.append(1), by_sequence(*a, **k))[1])
    pipeline = {"tokens_per_micro_batch": limit}
    padded, packed = (
        learner_of(tiny_model_folder("qwen3"), student={"attn_implementation": name}, pipeline=pipeline)
        for name in ("sdpa", "varlen")
    )
    for ours, theirs in zip(padded.reverse_kl(BATCH), packed.reverse_kl(BATCH), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    num_layers, calls[:] = packed.student.model.config.num_hidden_layers, []
    metrics = [learner.step(BATCH) for learner in (padded, packed)]
    assert len(calls) == num_layers * len(pack(BATCH, packed.config.loss, limit))
    for name in ("loss", "grad_norm", "single_step_kl"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4)
    weights = [torch.cat([p.detach().flatten() for p in learner.student.parameters()]) for learner in (padded, packed)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_a_packed_row_has_no_padding() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0]])
    arguments, where = attention.pack_rows(ids, torch.tensor([3, 1, 2]))
    assert arguments["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert arguments["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert arguments["cu_seq_lens_q"].tolist() == [0, 3, 4, 6] and arguments["max_length_k"] == 3
    kept = ids.flatten() > 0
    assert torch.equal(arguments["input_ids"][0][where[kept]], ids.flatten()[kept])


@pytest.mark.parametrize("disable_dropout", [True, False])
@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen"])
def test_every_layer_takes_the_attention_that_was_chosen(
    name: str, disable_dropout: bool, tiny_model_folder: Any
) -> None:
    options = {"model": tiny_model_folder("qwen3"), "attn_implementation": name, "disable_dropout": disable_dropout}
    model: Any = load_student(RunConfig(student=options).student).model
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {name}
    assert attention.packs(model) == (name == "varlen")


@pytest.mark.parametrize("name", ["flash_attention_2", "no-such-attention"])
def test_attention_that_cannot_be_had_is_refused(name: str, tiny_model_folder: Any) -> None:
    config = RunConfig(student={"model": tiny_model_folder("llama"), "attn_implementation": name}).student
    with pytest.raises(ConfigError, match=f"student.attn_implementation = '{name}' cannot be had: .+"):
        load_student(config)


def test_attention_without_a_soft_cap_is_refused_where_the_model_has_one(tiny_model_folder: Any) -> None:
    model: Any = load_student(RunConfig(student={"model": tiny_model_folder("llama")}).student).model
    model.config.attn_logit_softcapping = 50.0
    with pytest.raises(ConfigError, match="knows no soft cap of attention logits, which LlamaForCausalLM has"):
        attention.choose_attention(model, "varlen")
