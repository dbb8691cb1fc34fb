"""What each server takes of a GPU's memory, bytes: arithmetic on shapes alone, nothing is loaded or asked. The trainer's
part is in trainer_memory.py.

Numbers without a formula were counted from the sources of vLLM 0.32 and transformers 5.19; of vLLM nothing has been measured
on a GPU yet (docs/gpu.md). L is the longest sequence.
"""

from dataclasses import dataclass, fields, replace

from services.models.shape import ModelShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 1 << 30

# CUDA's context, cuBLAS's workspaces, the code of the kernels: once a process.
PROCESS = int(0.6 * GIB)
# vLLM: captured graphs and the compiled model's workspaces.
_GRAPHS = GIB
# vLLM's scheduler, by the memory of the GPU: tokens of a forward pass.
_LARGE_GPU, _BATCHED_TOKENS, _BATCHED_TOKENS_LARGE = 70 * GIB, 2048, 8192
# Float32 copies of a step's logits that vLLM's sampler makes: logprobs, the sort of top-p with its int64 ids.
_SAMPLER_COPIES = 6
# Prompt positions whose logits vLLM holds at once, and how many copies of them.
_PROMPT_LOGPROB_ROWS, _PROMPT_LOGPROB_COPIES = 1024, 4
# The same of the teacher's own head, whose chunk has at most that many elements (services/teacher/transformers/head.py).
_HEAD_COPIES, MAX_CHUNK_ELEMENTS = 5, 64 << 20
# Of a GPU's total: what its driver keeps, and what allocators leave between blocks.
_RESERVE = 0.03


@dataclass(frozen=True)
class Sizes:
    """What may be computed so that the roles fit; one that is None has no part in it."""

    max_model_len: int
    """L, tokens."""
    max_num_seqs: int = 256
    kv_tokens: int | None = None
    """Of the rollout server's cache; None: vLLM takes what is left."""
    teacher_kv_tokens: int | None = None
    tokens_per_forward: int = 16384
    rows_per_head_chunk: int = 1024
    tokens_per_micro_batch: int = 16384


@dataclass(frozen=True)
class Share:
    """Of one role on one GPU, bytes."""

    parameters: int
    gradients: int = 0
    optimizer: int = 0
    """AdamW's two moments."""
    kv_cache: int = 0
    head: int = 0
    """Logits; of the trainer what embedding and head take when they take most."""
    activations: int = 0
    """Of the trainer what a micro-batch takes beyond that."""
    other: int = PROCESS
    """CUDA's context, graphs, nccl."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def usable_bytes(total_bytes: int) -> int:
    """What the roles may share of a GPU."""
    return int(total_bytes * (1 - _RESERVE))


def kv_bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.num_layers * shape.kv_size * BYTES[dtype]


def vllm_share(
    shape: ModelShape,
    dtype: str,
    sizes: Sizes,
    gpu_bytes: int,
    *,
    num_gpus: int,
    kv_tokens: int | None,
    bucket_bytes: int = 0,
    scores_prompts: bool = False,
) -> Share:
    """vLLM on each of the `num_gpus` that it spreads a model over.

    Args:
        gpu_bytes: of one GPU.
        kv_tokens: tokens of the cache; None: of the least that vLLM starts with, one sequence.
        bucket_bytes: of a weight push, for which the largest tensors are made anew; 0: no pushes.
        scores_prompts: reports the logprobs of prompts.
    """
    size, tokens = BYTES[dtype], _BATCHED_TOKENS_LARGE if gpu_bytes >= _LARGE_GPU else _BATCHED_TOKENS
    logits = sizes.max_num_seqs * shape.vocab_size * 4 * _SAMPLER_COPIES
    if scores_prompts:
        logits += _PROMPT_LOGPROB_ROWS * shape.vocab_size * 4 * _PROMPT_LOGPROB_COPIES
    push = bucket_bytes + 2 * shape.embedding_parameters * size // num_gpus if bucket_bytes else 0
    return Share(
        parameters=_weight_bytes(shape, dtype) // num_gpus,
        kv_cache=kv_bytes_per_token(shape, dtype) * (kv_tokens or sizes.max_model_len) // num_gpus,
        head=logits,
        # A push and a forward pass take turns.
        activations=max(tokens * _forward_bytes_per_token(shape, size) // num_gpus, push - logits),
        other=PROCESS + _GRAPHS,
    )


def teacher_share(shape: ModelShape, dtype: str, sizes: Sizes) -> Share:
    """The teacher server with transformers' engine."""
    tokens = max(sizes.tokens_per_forward, sizes.max_model_len)
    per_token = _forward_bytes_per_token(shape, BYTES[dtype]) + 2 * shape.hidden_size * BYTES[dtype]
    if dtype == "float32":
        per_token += math_attention_bytes(shape, sizes.max_model_len, copies=2)
    chunk = min(sizes.rows_per_head_chunk * shape.vocab_size, max(MAX_CHUNK_ELEMENTS, shape.vocab_size))
    return Share(
        parameters=_weight_bytes(shape, dtype),
        head=_HEAD_COPIES * 4 * chunk,
        activations=tokens * per_token,
        other=PROCESS,
    )


def _weight_bytes(shape: ModelShape, dtype: str) -> int:
    return shape.stored_bytes or shape.num_parameters * BYTES[dtype]


def _forward_bytes_per_token(shape: ModelShape, size: int) -> int:
    """The widest layer of a forward pass without gradients: gate, up and their product, queries, keys, values, residuals."""
    return (3 * shape.intermediate_size + 4 * shape.query_size + 8 * shape.hidden_size) * size


def math_attention_bytes(shape: ModelShape, longest: int, copies: int) -> int:
    return 4 * shape.num_heads * longest * copies


@dataclass(frozen=True)
class Shrinkable:
    """A size that may become smaller for want of room."""

    name: str
    start: int
    comfortable: int
    """Down to here little speed is lost."""
    floor: int

    def halve(self, sizes: Sizes, *, to_floor: bool) -> Sizes | None:
        """Smaller sizes, or None where it is as small as it may be."""
        value, least = getattr(sizes, self.name), self.floor if to_floor else max(self.comfortable, self.floor)
        return None if value <= least else replace(sizes, **{self.name: max(least, value // 2)})
