"""The tables of docs/scaling.md: python -m services.gpus.scaling [MODEL ...]

How a student of some size is spread over GPUs that the trainer has for itself: float32 weights, bfloat16 compute, gradient
checkpointing, sequences of up to 4,096 tokens. With models, folders or hub ids, the same tables for those.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace

from services.config import DEFAULT_TOKENS, RunConfig
from services.gpus.memory import GIB, Sizes, usable_bytes
from services.gpus.trainer_memory import Layout, host_memory, trainer_share
from services.models.shape import ModelShape, read_shape

_LENGTH = 4096
_GPUS, _SIZES_GB = (1, 2, 4, 8, 16), (24, 48, 80)
_TOKENS = (DEFAULT_TOKENS, DEFAULT_TOKENS // 2, _LENGTH)

# Hidden size, layers, heads, key-value heads, intermediate size, and whether embedding and head are one.
_QWEN3 = {
    "0.6B": (1024, 28, 16, 8, 3072, True),
    "1.7B": (2048, 28, 16, 8, 6144, True),
    "4B": (2560, 36, 32, 8, 9728, True),
    "8B": (4096, 36, 32, 8, 12288, False),
    "14B": (5120, 40, 40, 8, 17408, False),
    "32B": (5120, 64, 64, 8, 25600, False),
}


def qwen3(size: str) -> ModelShape:
    """A model of the family, as its config.json says."""
    hidden, layers, heads, kv_heads, intermediate, is_tied = _QWEN3[size]
    return ModelShape.from_config(
        {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128,
            "intermediate_size": intermediate,
            "vocab_size": 151_936,
            "tie_word_embeddings": is_tied,
        }
    )


def tables(shapes: Mapping[str, ModelShape]) -> str:
    """Markdown: for each size of GPU a table of layouts, what a rank holds, and what a machine holds."""
    parts = [f"**{size} GB**\n\n" + _layouts(shapes, size) for size in _SIZES_GB]
    return "\n\n".join([*parts, "**What a rank holds**\n\n" + _ranks(shapes), "**Host memory**\n\n" + _hosts(shapes)])


def _layouts(shapes: Mapping[str, ModelShape], size_gb: int) -> str:
    """Rows of models, columns of numbers of GPUs: the layout that fits and moves least, and the GiB that it takes of each GPU."""
    heads = ["student", *(f"{number} GPU{'s' if number > 1 else ''}" for number in _GPUS)]
    return _table(heads, [[name, *(_moves_least(shape, n, size_gb) for n in _GPUS)] for name, shape in shapes.items()])


def _moves_least(shape: ModelShape, num_gpus: int, size_gb: int) -> str:
    whole = Layout(num_ranks=num_gpus, num_local_ranks=num_gpus)
    spread = replace(whole, shard_degree=num_gpus)
    choices = {"one rank" if num_gpus == 1 else "ddp": whole, "fsdp2": spread}
    choices["cpu_offload"] = replace(spread, cpu_offload=True)
    for name, layout in choices.items():
        for tokens in _TOKENS:
            needed = _rank_bytes(shape, layout, tokens)
            if needed <= usable_bytes(size_gb * 10**9):
                fewer = "" if tokens == DEFAULT_TOKENS else f", {tokens:,} tokens"
                return f"{name}: {needed / GIB:.0f}{fewer}"
    return "-"


def _ranks(shapes: Mapping[str, ModelShape]) -> str:
    """Rows of models: what a rank of eight holds, and for comparison all of one with a whole copy."""
    columns = ("parameters", "gradients", "optimizer", "head", "activations", "other", "total")
    rows = []
    for name, shape in shapes.items():
        whole = Layout(num_ranks=8, num_local_ranks=8)
        share = trainer_share(shape, _sizes(DEFAULT_TOKENS), replace(whole, shard_degree=8), _bucket_bytes())
        cells = [f"{getattr(share, column) / GIB:.1f}" for column in columns]
        rows.append([name, *cells, f"{_rank_bytes(shape, whole, DEFAULT_TOKENS) / GIB:.1f}"])
    return _table(["fsdp2 on 8 GPUs, GiB", *columns, "total with ddp"], rows)


def _hosts(shapes: Mapping[str, ModelShape]) -> str:
    """Rows of models: the least that eight ranks need of their machine's memory."""
    rows = []
    for name, shape in shapes.items():
        layout = Layout(num_ranks=8, num_local_ranks=8, shard_degree=8)
        hosts = [host_memory(shape, one) for one in (layout, replace(layout, cpu_offload=True))]
        rows.append([name, *(f"{host.needed / GIB:.0f}" for host in hosts)])
    return _table(["fsdp2 on 8 GPUs, GiB", "without offload", "with cpu_offload"], rows)


def _sizes(tokens: int) -> Sizes:
    return Sizes(_LENGTH, tokens_per_micro_batch=tokens)


def _bucket_bytes() -> int:
    return RunConfig().weight_sync.bucket_bytes


def _rank_bytes(shape: ModelShape, layout: Layout, tokens: int) -> int:
    return trainer_share(shape, _sizes(tokens), layout, _bucket_bytes()).total


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def main(models: list[str]) -> int:
    found = {model: read_shape(model) for model in models}
    if unknown := [model for model, shape in found.items() if shape is None]:
        print(f"no config.json can be read of {', '.join(unknown)}", file=sys.stderr)
        return 2
    print(tables({name: shape for name, shape in found.items() if shape} or {size: qwen3(size) for size in _QWEN3}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
