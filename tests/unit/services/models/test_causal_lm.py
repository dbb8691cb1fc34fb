"""A model's body over padded rows, for architectures that encode positions in different ways."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
)

from services.models.causal_lm import hidden_states, rope_switch
from services.models.padding import pad_sequences

SEQUENCES = [[7, 3, 9, 1, 1, 4, 2, 8, 5], [6, 2], [1], [5, 5, 5, 9, 2]]
SHAPE = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 4,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "learned": GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2),
    "learned, from the mask": OPTConfig(vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                        ffn_dim=32, word_embed_proj_dim=16),
    "alibi": BloomConfig(vocab_size=12, hidden_size=16, n_layer=2, n_head=2),
    "rotary": LlamaConfig(**SHAPE),
    "sliding": MistralConfig(**SHAPE, sliding_window=3),
    "sliding and full": Gemma2Config(**SHAPE, sliding_window=3),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_sees_the_padding(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).double().eval()
    with torch.inference_mode():
        together = hidden_states(model, pad_sequences(SEQUENCES, [1] * len(SEQUENCES)).input_ids)
        for row, sequence in zip(together, SEQUENCES, strict=True):
            alone = hidden_states(model, torch.tensor([sequence]))[0]
            torch.testing.assert_close(row[: len(sequence)], alone, rtol=0, atol=1e-12)


def test_where_rotary_frequencies_switch_is_read_from_the_configuration() -> None:
    phi3 = AutoModelForCausalLM.from_config(
        Phi3Config(**SHAPE, max_position_embeddings=64, original_max_position_embeddings=4, rope_parameters=LONGROPE)
    )
    assert rope_switch(phi3) == 4
    for name in ("learned", "rotary"):
        assert rope_switch(AutoModelForCausalLM.from_config(CONFIGS[name])) is None
