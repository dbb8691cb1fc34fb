"""Random students of real sizes on a GPU, and batches for them."""

from pathlib import Path
from typing import Any

import torch

from services.config import RunConfig
from services.wire.batch import TrainingBatch
from tests.models import save_model
from tests.random_batches import random_batch
from trainer.learner import Learner
from trainer.parallel import load_and_place
from trainer.ranks.group import Ranks

DEVICE = torch.device("cuda", 0)
VOCABULARY, TOP_K, PROMPT = 151_936, 64, 64
_OF_ALL = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16_384,
    # Wider than a real one's, so that a token's logprob depends on the weights: logits have a deviation of 1.
    "initializer_range": 0.03,
}


def _shape(layers: int, hidden: int, inner: int, heads: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    return _OF_ALL | sizes | {"num_attention_heads": heads}


QWEN3 = {
    "0.6B": _shape(28, 1024, 3072, 16),
    "1.7B": _shape(28, 2048, 6144, 16),
    "4B": _shape(36, 2560, 9728, 32),
}
"""By the names that these shapes have on the hub."""


def save_random(folder: Path, size: str, **changes: Any) -> str:
    """A Qwen3 of random weights in a folder, with a byte's tokenizer."""
    with DEVICE:
        return save_model(folder, "qwen3", **QWEN3[size] | changes)


def batch_of(*lengths: int, seed: int = 0, vocabulary: int = VOCABULARY) -> TrainingBatch:
    """Random samples of so many tokens, PROMPT of each the prompt's."""
    return random_batch([length - PROMPT for length in lengths], PROMPT, TOP_K, vocabulary, seed)


def run_config(model: str, **sections: dict[str, Any]) -> RunConfig:
    """Of a student that learns from half-precision rollouts, unless the sections say otherwise."""
    rollout = {"dtype": "bfloat16"} | sections.pop("rollout", {})
    return RunConfig(**sections | {"student": {"model": model} | sections.get("student", {}), "rollout": rollout})


def learner_of(model: str, **sections: dict[str, Any]) -> Learner:
    """One rank on the GPU, as a run places it."""
    config, ranks = run_config(model, **sections), Ranks(device=DEVICE)
    return Learner(config, load_and_place(config, ranks), 10, ranks)
