"""What the memory of a model depends on, from its config.json and the headers of its weights; loads no torch."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from huggingface_hub import (
    get_local_safetensors_metadata,
    get_safetensors_metadata,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils import SafetensorsRepoMetadata

# Other names that architectures have for the same number.
_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "num_heads"),
    "vocab_size": ("vocab_size",),
}
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class ModelShape:
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Of the experts that see a token, together."""
    vocab_size: int
    max_positions: int | None
    is_tied: bool
    """Whether the output head is the embedding."""
    tensors: tuple[tuple[int, int, int], ...]
    """Of its parameters: how many there are of a size, rows, and elements a row."""
    linears: tuple[tuple[str, int, int, int], ...]
    """Linear layers of the decoder's layers, without experts: the last part of their name, how many there are, rows, columns."""
    stored_bytes: int | None
    """Of quantised weights, which keep their size whatever the dtype; else None."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], weights: SafetensorsRepoMetadata | None = None) -> Self:
        """Read a config.json.

        Args:
            weights: headers of the weights; without them the parameters of a usual decoder are counted.

        Raises:
            KeyError: it lacks a number that is needed.
        """
        text = {**config, **config.get("text_config", {})}
        sizes = {name: _first(text, names) for name, names in _NAMES.items()}
        heads, hidden = sizes["num_heads"], sizes["hidden_size"]
        experts = text.get("num_experts") or text.get("num_local_experts") or 0
        inner = text.get("intermediate_size") or text.get("n_inner") or 4 * hidden
        of_expert = text.get("moe_intermediate_size") or inner
        shape = cls(
            **sizes,
            num_kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or hidden // heads,
            intermediate_size=of_expert * (text.get("num_experts_per_tok") or 1) if experts else inner,
            max_positions=next((text[name] for name in _POSITIONS if text.get(name)), None),
            is_tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))),
            tensors=(),
            linears=(),
            stored_bytes=None,
        )
        tensors = shape._usual_tensors(experts, of_expert) if weights is None else _tensors(weights, shape.is_tied)
        counted = tuple(sorted((number, *size) for size, number in Counter(tensors).items()))
        quantised = weights is not None and text.get("quantization_config")
        linears = shape._usual_linears(has_experts=bool(experts)) if weights is None else _linears(weights)
        shape = replace(shape, linears=linears)
        return replace(shape, tensors=counted, stored_bytes=_num_bytes(weights) if weights and quantised else None)

    def _usual_tensors(self, num_experts: int, of_expert: int) -> list[tuple[int, int]]:
        """Rows, and elements a row; what is one number a row are norms."""
        hidden, queries, keys = self.hidden_size, self.query_size, self.kv_size
        layer = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
        layer += [(self.head_dim, 1), (self.head_dim, 1), (hidden, 1), (hidden, 1)]
        if num_experts:
            layer += [(num_experts, 2 * of_expert * hidden), (num_experts, hidden * of_expert), (num_experts, hidden)]
        else:
            inner = self.intermediate_size
            layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
        embeddings = [(self.vocab_size, hidden)] * (1 if self.is_tied else 2)
        return [*layer * self.num_layers, *embeddings, (hidden, 1)]

    def _usual_linears(self, *, has_experts: bool) -> tuple[tuple[str, int, int, int], ...]:
        hidden, queries, keys, inner = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        layer = [
            ("q_proj", queries, hidden),
            ("k_proj", keys, hidden),
            ("v_proj", keys, hidden),
            ("o_proj", hidden, queries),
        ]
        if not has_experts:
            layer += [("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner)]
        return tuple((name, self.num_layers, rows, columns) for name, rows, columns in layer)

    def adapter_parameters(self, rank: int, targets: tuple[str, ...] | None, shard_degree: int = 1) -> int:
        """Of LoRA matrices of a rank, on the first of the ranks that share them.

        Args:
            targets: last parts of the names of the adapted layers; None: all linear ones.
        """
        return sum(
            number * (-(-rank // shard_degree) * columns + -(-rows // shard_degree) * rank)
            for name, number, rows, columns in self.linears
            if targets is None or name in targets
        )

    @property
    def linear_parameters(self) -> int:
        """Of all linear layers of the decoder's layers, without experts."""
        return sum(number * rows * columns for _, number, rows, columns in self.linears)

    @property
    def num_parameters(self) -> int:
        return self.shard_parameters(1)

    def shard_parameters(self, shard_degree: int) -> int:
        """On the first of the ranks that share the parameters: their rows are cut into equal parts, the last one filled up."""
        return sum(number * -(-rows // shard_degree) * row for number, rows, row in self.tensors)

    @property
    def embedding_parameters(self) -> int:
        """Of one embedding, the largest tensor of most models."""
        return self.vocab_size * self.hidden_size

    @property
    def root_parameters(self) -> int:
        """Of what is in no layer: embedding, head, last norm."""
        return self.embedding_parameters * (1 if self.is_tied else 2) + self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Of one layer."""
        return (self.num_parameters - self.root_parameters) // self.num_layers

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def read_shape(model: str) -> ModelShape | None:
    """The shape of a folder or hub id; None when it cannot be read, which whoever loads the model will explain."""
    try:
        config = Path(model, "config.json")
        if not config.is_file():
            # What lies in the cache first: without a network the hub is asked for half a minute.
            cached = try_to_load_from_cache(model, "config.json")
            config = Path(cached if isinstance(cached, str) else hf_hub_download(model, "config.json"))
        return ModelShape.from_config(json.loads(config.read_text()), _weights(model, config.parent))
    except Exception:  # of the network, of the hub, of a file that is none
        return None


def _weights(model: str, folder: Path) -> SafetensorsRepoMetadata | None:
    """The headers of a model's weights: from its folder, which may be the hub's cache, else from the hub."""
    try:
        return get_local_safetensors_metadata(folder)
    except Exception:
        if Path(model).exists():
            return None
    try:
        return get_safetensors_metadata(model)
    except Exception:
        return None


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return int(next((config[name] for name in names if config.get(name)), None) or config[names[0]])


def _tensors(weights: SafetensorsRepoMetadata, tied: bool) -> Iterable[tuple[int, int]]:
    tensors = {name: t for file in weights.files_metadata.values() for name, t in file.tensors.items()}
    if tied and any("embed" in name for name in tensors):
        tensors.pop("lm_head.weight", None)  # some checkpoints hold it although it is the embedding
    return ((next(iter(t.shape), 1), math.prod(t.shape[1:])) for t in tensors.values())


def _linears(weights: SafetensorsRepoMetadata) -> tuple[tuple[str, int, int, int], ...]:
    """Matrices that are named by a number (of their layer) and are none of an expert."""
    counted: Counter[tuple[str, int, int]] = Counter()
    for file in weights.files_metadata.values():
        for name, tensor in file.tensors.items():
            parts = name.split(".")
            is_in_layer = any(part.isdigit() for part in parts) and "experts" not in parts
            if is_in_layer and len(tensor.shape) == 2 and parts[-1] == "weight":
                counted[parts[-2], tensor.shape[0], tensor.shape[1]] += 1
    return tuple((name, number, rows, columns) for (name, rows, columns), number in sorted(counted.items()))


def _num_bytes(weights: SafetensorsRepoMetadata) -> int:
    tensors = [t for file in weights.files_metadata.values() for t in file.tensors.values()]
    return sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors)
