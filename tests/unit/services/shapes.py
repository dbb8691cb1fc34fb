"""Shapes of the models of the README's example."""

from services.models.shape import ModelShape

_COMMON = {
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
}
QWEN3_0_6B = ModelShape.from_config(_COMMON | {"hidden_size": 1024, "intermediate_size": 3072})
QWEN3_1_7B = ModelShape.from_config(_COMMON | {"hidden_size": 2048, "intermediate_size": 6144})
