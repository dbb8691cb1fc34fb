"""Small random models that tests save as ordinary folders."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trainer.tiny.pair import build_tokenizer

_SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": None,
}


LONGROPE_SWITCH = 8
"""Tokens up to which "phi3" has one set of rotary frequencies, and another beyond."""


def save_model(
    folder: Path,
    architecture: str,
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **changes: Any,
) -> str:
    """A random "qwen3" (tied embeddings), "qwen3_moe" (untied, fused experts), "llama" (untied), "phi3" (longrope) or "gpt2" (tied,
    Conv1D layers with biases).

    Heads of queries and, but for "llama", of keys divide by two, for tensor parallelism of 2.

    Args:
        tokenizer: default: the tiny pair's, a token a byte.
        changes: to the model's configuration.

    Returns:
        The folder.
    """
    tokenizer = tokenizer or build_tokenizer()
    shape = {
        **_SHAPE,
        "num_key_value_heads": 1 if architecture == "llama" else 2,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }
    torch.manual_seed(seed)
    if architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    elif architecture == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(shape | experts | changes)))
    elif architecture == "phi3":
        shape.pop("head_dim")
        factors = {"short_factor": [1.0] * 16, "long_factor": [40.0] * 16}
        rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LONGROPE_SWITCH}
        options = {"original_max_position_embeddings": LONGROPE_SWITCH, "rope_parameters": rope | factors}
        model = Phi3ForCausalLM(Phi3Config(**shape, **options))
    elif architecture == "gpt2":
        sizes = {"n_embd": shape["hidden_size"], "n_layer": 2, "n_head": 2, "n_positions": 256}
        ends = {name: shape[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **ends))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
