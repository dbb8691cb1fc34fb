"""Dropout is off in every architecture that has one, wherever it keeps the probability, and on again in what is saved."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StableLmConfig,
)

from services.errors import StartupError
from trainer.dropout import disable_dropout

SHAPE = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
WIDE = {**SHAPE, "intermediate_size": 32, "num_key_value_heads": 2, "pad_token_id": 0}
GPT = {"vocab_size": 23, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**GPT, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "gptj": GPTJConfig(**GPT, rotary_dim=4, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "gpt_neo": GPTNeoConfig(
        vocab_size=23, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
        max_position_embeddings=32, attention_dropout=0.5, embed_dropout=0.5, resid_dropout=0.5,
    ),
    "gpt_neox": GPTNeoXConfig(**SHAPE, intermediate_size=32, hidden_dropout=0.5, attention_dropout=0.5),
    "opt": OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
    "bloom": BloomConfig(vocab_size=23, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.5, attention_dropout=0.5),
    "falcon": FalconConfig(**SHAPE, hidden_dropout=0.5, attention_dropout=0.5),
    "phi": PhiConfig(**SHAPE, intermediate_size=32, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5),
    "phi3": Phi3Config(**WIDE, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5),
    "llama": LlamaConfig(**WIDE, attention_dropout=0.5),
    "gemma2": Gemma2Config(**WIDE, head_dim=8, attention_dropout=0.5),
    "granite": GraniteConfig(**WIDE, attention_dropout=0.5),
    "stablelm": StableLmConfig(**WIDE, hidden_dropout=0.5, attention_dropout=0.5),
    "mixtral": MixtralConfig(**WIDE, num_local_experts=2, attention_dropout=0.5, router_jitter_noise=0.5),
}  # fmt: skip
_OWN_ATTENTION = {"bloom", "gptj", "gpt_neo"}
IDS = torch.arange(1, 21).unsqueeze(0)


def build(name: str, attention: str = "eager") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=attention).train()


def is_noisy(model: PreTrainedModel) -> bool:
    with torch.no_grad():
        first, second = model(IDS).logits, model(IDS).logits
    return not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "eager") for name in CONFIGS), *((name, "sdpa") for name in CONFIGS if name not in _OWN_ATTENTION)],
)
def test_two_forward_passes_in_training_mode_are_equal(name: str, attention: str) -> None:
    model = build(name, attention)
    assert is_noisy(model)
    reference = build(name, attention).eval()(IDS).logits
    disable_dropout(model)
    assert model.training and not is_noisy(model)
    torch.testing.assert_close(model(IDS).logits, reference)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "llama", "mixtral"])
def test_the_saved_configuration_keeps_its_dropout(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "before")
    disable_dropout(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("before", "after"))
    assert before == after and AutoConfig.from_pretrained(tmp_path / "after").to_dict()
    assert 0.5 in after.values()


class _Noise(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.1 * torch.randn_like(hidden) if self.training else hidden


def test_a_noise_of_unknown_kind_is_refused() -> None:
    model = build("llama")
    model.model.norm = nn.Sequential(model.model.norm, _Noise())
    with pytest.raises(StartupError, match=r"student\.disable_dropout = true, but .* LlamaForCausalLM .* differ by"):
        disable_dropout(model)


def test_the_state_of_random_numbers_is_left_alone() -> None:
    model = build("opt")
    before = torch.random.get_rng_state()
    disable_dropout(model)
    assert torch.equal(before, torch.random.get_rng_state())
