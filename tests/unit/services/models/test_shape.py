"""Shapes of models, from their config and the headers of their weights, against models that are built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from services.models.shape import ModelShape, read_shape
from tests.models import save_model


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(tie_word_embeddings=True, num_hidden_layers=3, hidden_size=64, vocab_size=1000),
        LlamaConfig(tie_word_embeddings=False, num_hidden_layers=3, hidden_size=64, num_attention_heads=4),
        Qwen3MoeConfig(num_hidden_layers=2, hidden_size=64, num_experts=8, moe_intermediate_size=32, vocab_size=500),
        Gemma3TextConfig(num_hidden_layers=2, hidden_size=64, vocab_size=900),
    ],
    ids=lambda config: config.model_type,
)
def test_parameters_of_usual_decoders_are_counted_from_the_config(config: Any) -> None:
    """Where no weights can be seen; biases and further norms are a few parts in a thousand."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_config(json.loads(config.to_json_string()))
    assert shape.num_parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=5e-3)


def test_qwen3_0_6b_is_counted_exactly() -> None:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
    sizes |= {"head_dim": 128, "intermediate_size": 3072, "vocab_size": 151_936}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, tie_word_embeddings=True))
    shape = ModelShape.from_config(sizes | {"tie_word_embeddings": True})
    assert shape.num_parameters == sum(p.numel() for p in model.parameters()) == 596_049_920
    assert (shape.query_size, shape.kv_size, shape.embedding_parameters) == (2048, 1024, 151_936 * 1024)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "phi3"])
def test_a_folder_says_what_its_weights_are(architecture: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    shape = read_shape(folder)
    assert shape is not None and shape.stored_bytes is None
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert (shape.num_layers, shape.hidden_size, shape.max_positions) == (2, 64, 256)


def test_sharded_weights_are_added_up(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "one", "llama"))
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    shape = read_shape(str(tmp_path / "many"))
    assert shape is not None and shape.num_parameters == sum(p.numel() for p in model.parameters())


def test_a_head_that_is_stored_beside_its_embedding_counts_once(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "qwen3")
    before = read_shape(folder)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert before is not None and read_shape(folder) == before


def test_quantised_weights_keep_their_size(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    shape = read_shape(folder)
    assert shape is not None and shape.stored_bytes == 4 * shape.num_parameters  # what lies there is float32


def test_a_multimodal_config_is_read_for_its_text_model() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    shape = ModelShape.from_config({"model_type": "gemma3", "hidden_size": 7, "text_config": text})
    assert shape == ModelShape.from_config(text) and shape.head_dim == 16


@pytest.mark.parametrize("content", ["{}", "[", None])
def test_a_model_that_cannot_be_read_has_no_shape(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert read_shape(str(tmp_path)) is None


def test_a_hub_id_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot with config and weights, as a download leaves it; the network is not asked."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--model"
    save_model(repository / "snapshots" / revision, "llama")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("services.models.shape.hf_hub_download", None)  # it would look for news first
    shape = read_shape("owner/model")
    assert shape is not None and shape == read_shape(str(repository / "snapshots" / revision))
