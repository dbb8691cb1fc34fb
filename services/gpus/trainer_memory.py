"""What a rank of the trainer takes, bytes: arithmetic on shapes alone, as in memory.py.

A rank that is spread (trainer/parallel.py) keeps its part of the parameters, of their gradients and of AdamW's two moments. The
whole of a layer is gathered when it runs, in the compute dtype; embedding, last norm and head are one group, which is there
from the beginning of a pass to its end. tests/unit/trainer/test_rank_memory.py compares all of that with real tensors.
"""

from dataclasses import dataclass
from typing import Self

from services.config import RunConfig
from services.gpus.memory import BYTES, GIB, PROCESS, Share, Sizes, math_attention_bytes
from services.models.shape import ModelShape

# Buffers of nccl for the groups of a mesh; once a process. A guess: they depend on the machine.
_NCCL = int(0.5 * GIB)
# Positions and elements of a tile of the head's logits (CHUNK_TOKENS, MAX_TILE_ELEMENTS and those of a GPU in
# trainer/loss/head.py).
_TILE, _GPU_TILE = (1024, 2**23), (4096, 2**26)
# The head's logits and the sum of its weight's gradients; sums of gradients over ranks.
_FLOAT32 = 4
# A weight in four bits (NF4), and its part of the float32 scale of 64 of them.
_4BIT = 0.5 + 4 / 64


@dataclass(frozen=True)
class Layout:
    """How the trainer is spread, and in which precision it works."""

    num_ranks: int = 1
    num_local_ranks: int = 1
    """Of this machine."""
    shard_degree: int = 1
    """Ranks that hold one copy of the student together."""
    cpu_offload: bool = False
    master_dtype: str = "float32"
    compute_dtype: str = "bfloat16"
    rollout_dtype: str = "bfloat16"
    checkpointing: bool = True
    on_gpu: bool = True
    adapter_rank: int = 0
    """Of the LoRA adapter that is trained; 0: all weights are."""
    adapter_targets: tuple[str, ...] | None = None
    """Last parts of the names of the layers that it is on; None: all linear ones, of which a pattern is a part."""
    in_4bit: bool = False
    """Whether the linear weights beside the adapter are."""
    has_reference: bool = False
    """Whether a frozen copy of the student is held beside it."""

    @classmethod
    def of(cls, config: RunConfig, num_ranks: int, num_local_ranks: int, *, on_gpu: bool) -> Self:
        """What the options stand for."""
        trainer, lora = config.trainer, config.lora
        targets = lora.target_modules
        return cls(
            num_ranks=num_ranks,
            num_local_ranks=num_local_ranks,
            shard_degree=1 if trainer.parallelism == "ddp" else trainer.shard_degree or num_local_ranks,
            cpu_offload=trainer.cpu_offload and on_gpu,
            master_dtype=config.student.dtype,
            compute_dtype=config.compute_dtype(on_gpu=on_gpu),
            rollout_dtype=config.rollout.dtype,
            checkpointing=config.uses_gradient_checkpointing(on_gpu=on_gpu),
            on_gpu=on_gpu,
            adapter_rank=lora.r,
            adapter_targets=None if isinstance(targets, str) else tuple(name.split(".")[-1] for name in targets),
            in_4bit=lora.load_in_4bit,
            has_reference=config.loss.alpha_reference_kl > 0,
        )

    @property
    def is_gathered(self) -> bool:
        """Whether layers are gathered before they run, which a rank that holds everything needs for another dtype or memory
        only."""
        trained = "float32" if self.adapter_rank and not self.in_4bit else self.master_dtype
        return self.shard_degree > 1 or self.compute_dtype != trained or self.cpu_offload

    def shard_bytes(self, shape: ModelShape) -> int:
        """Of a rank's parameters."""
        whole = BYTES[self.master_dtype] * shape.shard_parameters(self.shard_degree)
        if self.in_4bit:
            whole += int((_4BIT - BYTES[self.master_dtype]) * shape.linear_parameters)
        return whole + (self.trained_bytes(shape) if self.adapter_rank else 0)

    def kept_bytes(self, shape: ModelShape) -> int:
        """Of a rank's parameters, and of its part of the reference."""
        return (2 if self.has_reference else 1) * self.shard_bytes(shape)

    def trained_bytes(self, shape: ModelShape) -> int:
        """Of those of a rank's parameters that are trained; of their gradients, and of each of AdamW's moments, as much again."""
        if not self.adapter_rank:
            return self.shard_bytes(shape)
        return _FLOAT32 * shape.adapter_parameters(self.adapter_rank, self.adapter_targets, self.shard_degree)

    def adapter_of_layer(self, shape: ModelShape) -> int:
        """Parameters of the adapters of one layer, whole."""
        return shape.adapter_parameters(self.adapter_rank, self.adapter_targets) // shape.num_layers


def trainer_share(shape: ModelShape, sizes: Sizes, layout: Layout, bucket_bytes: int) -> Share:
    """A rank on its GPU: what it keeps, one micro-batch, and the buffers of a push."""
    kept, trained = (0, 0) if layout.cpu_offload else (layout.kept_bytes(shape), layout.trained_bytes(shape))
    head, step = _step_bytes(shape, sizes, layout)
    fullest = max(step, _push_bytes(shape, layout, bucket_bytes))
    return Share(
        parameters=kept,
        gradients=trained,
        optimizer=2 * trained,
        head=head,
        activations=fullest - head,
        other=PROCESS + (_NCCL if layout.num_ranks > 1 else 0),
    )


def _push_bytes(shape: ModelShape, layout: Layout, bucket_bytes: int) -> int:
    """Two buckets, and a tensor as it is sent; a layer is merged with its adapters in float32."""
    merged = 2 * _FLOAT32 * shape.layer_parameters if layout.adapter_rank else 0
    return 2 * bucket_bytes + max(shape.embedding_parameters * BYTES[layout.rollout_dtype], merged)


def _step_bytes(shape: ModelShape, sizes: Sizes, layout: Layout) -> tuple[int, int]:
    """Of what comes and goes in a step: the head when it is largest, and all of it at the fullest moment."""
    tokens, size = max(sizes.tokens_per_micro_batch, sizes.max_model_len), BYTES[layout.compute_dtype]
    of_layer = _saved_bytes_per_token(shape, layout, sizes.max_model_len)
    # Checkpointed, each layer's input is kept and one layer at a time is computed again.
    kept = tokens * shape.num_layers * (size * shape.hidden_size if layout.checkpointing else of_layer)
    is_frozen = layout.adapter_rank > 0
    gradient = 0 if is_frozen else size * shape.embedding_parameters  # of the embedding or the head
    root = layer = sent = reduced = waiting = 0
    if layout.is_gathered:
        root = size * shape.root_parameters
        whole_layer = shape.layer_parameters + layout.adapter_of_layer(shape)
        trained = layout.adapter_of_layer(shape) if is_frozen else whole_layer
        # The layer that runs, the next one while it is gathered, and gradients.
        layer = size * ((2 if layout.shard_degree > 1 else 1) * whole_layer + trained)
        sent = _FLOAT32 * trained  # gradients of the layer before, on their way to the other ranks
        # Gradients in the order in which they are sent, beside those that were computed; a group of one sums and copies them.
        beside = 2 * _FLOAT32 if layout.shard_degree == 1 else size
        reduced = 0 if is_frozen else (_FLOAT32 + beside) * shape.root_parameters
    elif layout.num_ranks > 1:
        sent = layout.trained_bytes(shape)  # DistributedDataParallel makes its buckets anew, once, in the second step
    if layout.is_gathered or shape.is_tied:
        waiting = gradient  # the head's, until the embedding has run
    layer += 2 * tokens * of_layer  # its activations' gradients are as large as what it saved
    head = root + _head_bytes(shape, tokens, size, on_gpu=layout.on_gpu, is_frozen=is_frozen)
    moments = (
        head + kept,
        root + waiting + sent + kept + layer,
        root + waiting + sent + gradient,
        reduced,
    )
    return head, max(moments)


def _head_bytes(shape: ModelShape, tokens: int, size: int, *, on_gpu: bool, is_frozen: bool) -> int:
    """In the head's backward pass: the sum of its weight's gradients in float32; at its end that sum rounded, before it
    products of a tile, in float32 too; hidden states and the sums of their gradients; a tile of logits. A frozen head has no
    gradient of its weight."""
    most_rows, elements = _GPU_TILE if on_gpu else _TILE
    weight, rows = shape.embedding_parameters, min(tokens, most_rows)
    columns = min(shape.vocab_size, elements // rows)
    is_half = size < _FLOAT32
    tile = _FLOAT32 * rows * columns
    products = _FLOAT32 * (rows + columns) * shape.hidden_size if is_half else 0
    gradients = 0 if is_frozen else _FLOAT32 * weight + max(size * weight if is_half else 0, products)
    sums = _FLOAT32 * tokens * shape.hidden_size
    # The forward pass has a second tile; sums are beside it where autograd has not freed those of the micro-batch before.
    forward = tile + products + (0 if is_frozen else sums)
    return tile + size * tokens * shape.hidden_size + max(sums + max(gradients, products), forward)


def _saved_bytes_per_token(shape: ModelShape, layout: Layout, longest: int) -> int:
    """What one layer saves for the backward pass: 72 kB a token for Qwen3-0.6B in bfloat16, 123 kB in float32. On a GPU float32
    attention over grouped heads has no fused kernel, and saves its weights as well."""
    half = 8 * shape.intermediate_size + 20 * shape.hidden_size + 9 * (shape.query_size + shape.kv_size)
    if layout.compute_dtype != "float32":
        return half
    return int(1.7 * half) + (math_attention_bytes(shape, longest, copies=1) if layout.on_gpu else 0)


# ------------------------------------------------------------------------------------------- the machine's own memory


@dataclass(frozen=True)
class HostMemory:
    """What the ranks of the first machine take of its own memory, bytes; a micro-batch on a CPU comes on top."""

    load: int
    """While the last of them loads: ranks load in turns, each the whole student, of which it keeps its part."""
    train: int
    """Where the ranks compute, or keep things, on the host; and the two copies of the student that are pushed from."""
    save: int
    """The student is gathered on the first rank, between two steps."""

    @property
    def needed(self) -> int:
        return max(self.load, self.train, self.save)


def host_memory(shape: ModelShape, layout: Layout) -> HostMemory:
    """Of all ranks of the machine that has the first one."""
    whole = shape.num_parameters * BYTES[layout.master_dtype]
    is_here = layout.cpu_offload or not layout.on_gpu
    part, trained = (layout.kept_bytes(shape), layout.trained_bytes(shape)) if is_here else (0, 0)
    copies = 2 * shape.num_parameters * BYTES[layout.rollout_dtype] if layout.num_ranks > 1 else 0
    return HostMemory(
        # The last rank loads the reference beside its student.
        load=whole + (layout.num_local_ranks - 1) * part + layout.has_reference * is_here * layout.shard_bytes(shape),
        train=layout.num_local_ranks * (part + 3 * trained) + copies,
        save=layout.num_local_ranks * (part + 2 * trained)
        + copies
        + (whole if layout.shard_degree > 1 or layout.adapter_rank else 0),
    )
