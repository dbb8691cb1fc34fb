"""What the trainer sends is what `save_pretrained` would write."""

import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from services.weight_transfer import source as source_module
from services.weight_transfer.source import CheckpointSource
from tests.models import save_model


def save_mixture(folder: Path) -> str:
    config = Qwen3MoeConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=11,  # layers.10 sorts before layers.2 as text
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "phi3", "mixture"])
def test_names_shapes_and_values_are_those_of_a_saved_checkpoint(architecture: str, tmp_path: Path) -> None:
    folder = save_mixture(tmp_path) if architecture == "mixture" else save_model(tmp_path, architecture)
    saved = load_file(f"{folder}/model.safetensors")
    source = CheckpointSource(AutoModelForCausalLM.from_pretrained(folder), torch.bfloat16)
    announced = source.metadata()
    sent = dict(source)
    assert sent.keys() == saved.keys() and ("lm_head.weight" in sent) == (architecture != "qwen3")
    assert all(torch.equal(sent[name], saved[name].bfloat16()) for name in saved)
    assert [(m.name, m.dtype, m.shape) for m in announced] == [(n, t.dtype, tuple(t.shape)) for n, t in sent.items()]


def test_a_model_that_was_never_saved_has_the_same_names(tmp_path: Path) -> None:
    folder = save_mixture(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    made = Qwen3MoeForCausalLM(loaded.config)
    assert CheckpointSource(made, torch.float32).metadata() == CheckpointSource(loaded, torch.float32).metadata()


def test_metadata_gathers_nothing_and_iteration_one_layer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[weakref.ref[torch.Tensor]] = []

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        whole = tensor.clone()
        gathered.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(source_module, "materialize_full_tensor", gather)
    source = CheckpointSource(AutoModelForCausalLM.from_pretrained(save_mixture(tmp_path)), torch.float32)
    in_a_layer = len(list(source._model.model.layers[0].parameters()))
    source.metadata()
    assert gathered == []
    for _ in source:
        assert sum(whole() is not None for whole in gathered) <= in_a_layer
    assert len(gathered) == len(list(source._model.parameters()))


def test_weights_in_four_bits_are_sent_as_the_numbers_that_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bitsandbytes keeps them: two in a byte, with a state that says what they were."""
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "llama"))
    layer = model.model.layers[1].mlp.up_proj
    numbers = layer.weight.detach().clone().bfloat16()
    packed = torch.nn.Parameter(torch.zeros(numbers.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=numbers.shape, dtype=torch.bfloat16, numbers=numbers)  # type: ignore[attr-defined]
    layer.weight = packed
    stand_in = SimpleNamespace(dequantize_4bit=lambda data, state: state.numbers)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(functional=stand_in))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", stand_in)
    source = CheckpointSource(model, torch.float32)
    announced, sent = source.metadata(), dict(source)
    assert [(m.name, m.dtype, m.shape) for m in announced] == [(n, t.dtype, tuple(t.shape)) for n, t in sent.items()]
    assert torch.equal(sent["model.layers.1.mlp.up_proj.weight"], numbers.float())


def test_persistent_buffers_are_sent_as_they_are_saved(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "llama"))
    model.model.layers[0].register_buffer("correction", torch.arange(3))
    model.model.layers[0].register_buffer("scratch", torch.arange(3), persistent=False)
    sent = dict(CheckpointSource(model, torch.bfloat16))
    assert torch.equal(sent["model.layers.0.correction"], torch.arange(3)) and "model.layers.0.scratch" not in sent
