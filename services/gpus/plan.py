"""Who shares which GPU of this machine, and what each of them may take: computed from the run alone.

Every role computes the whole plan and takes its own part, so nothing is exchanged and roles that are started together,
one by one, or in containers on one card agree. Loads no torch.

    sizes that a run does not set     start at what is best, and are halved, the one that helps most first, until all fit
    nothing left to halve             ConfigError, which names an option whose change makes it fit
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

from services.config import (
    DEFAULT_HEAD_ROWS,
    DEFAULT_NUM_SEQS,
    DEFAULT_TOKENS,
    RunConfig,
)
from services.errors import ConfigError
from services.gpus.advice import LEAST_PROMPT_TOKENS, GpuShares, refusal, updated
from services.gpus.cards import Gpu
from services.gpus.memory import (
    GIB,
    MAX_CHUNK_ELEMENTS,
    Share,
    Shrinkable,
    Sizes,
    kv_bytes_per_token,
    teacher_share,
    vllm_share,
)
from services.gpus.sharing import count_ranks, gpus_of, neighbours, num_parts
from services.gpus.trainer_memory import Layout, trainer_share
from services.models.shape import ModelShape, read_shape

_DEFAULT_LENGTH = 4096
# Tokens that vLLM's cache is cut into, on a GPU with any kind of attention at most; one block it keeps for itself.
_CACHE_BLOCK = 64

# Of the table.
_COLUMNS = (*(field.name for field in fields(Share)), "total")

Shapes = Callable[[str], ModelShape | None]


@dataclass(frozen=True)
class MemoryPlan:
    """What was computed for the roles on this machine's GPUs."""

    gpus: tuple[GpuShares, ...]
    sizes: Sizes

    @property
    def fits(self) -> bool:
        return not any(gpu.missing for gpu in self.gpus)

    def share(self, role: str) -> list[tuple[Gpu, Share, bool]]:
        """Of a role on each of its GPUs, and whether others are there."""
        return [(g.gpu, g.shares[role], len(g.shares) > 1) for g in self.gpus if role in g.shares]

    def lines(self) -> list[str]:
        """A table to show before anything is loaded."""
        lines = []
        for part in self.gpus:
            head = f"GPU {part.gpu.index}, {part.gpu.total_bytes / GIB:.1f} GiB"
            lines.append(f"{head:<18}" + "".join(f"{name:>{_width(name)}}" for name in _COLUMNS) + "  GiB, computed")
            for role, share in part.shares.items():
                cells = (f"{getattr(share, name) / GIB:>{_width(name)}.1f}" for name in _COLUMNS)
                lines.append(f"  {role:<16}{''.join(cells)}")
        return lines


def _width(column: str) -> int:
    return max(8, len(column) + 2)


def plan(config: RunConfig, role: str | None = None, shapes: Shapes = read_shape) -> MemoryPlan | None:
    """What the roles that share a GPU with `role` take; None where there is nothing to plan: no GPU that `nvidia-smi`
    knows, or a model whose shape cannot be read.

    Args:
        role: one of ROLES; None: all of them, as `up` starts them.
        shapes: reads the shape of a model.

    Raises:
        ConfigError: a device is not there, or the roles do not fit, with the option to change.
    """
    if role == "rollout":
        config = updated(config, "rollout", num_servers=1)  # it is one of them
    roles = _roles(config, role, strict=True)
    if not roles or role not in (None, *roles):
        return None
    models = {name: (config.teacher if name == "teacher" else config.student).model or "" for name in roles}
    found = {model: shapes(model) for model in set(models.values())}
    known = {name: shape for name, model in models.items() if (shape := found[model]) is not None}
    if len(known) < len(roles):
        return None
    solved = _solve(config, roles, known)
    if not solved.fits:
        worst = max(solved.gpus, key=lambda part: part.missing)

        def fits(changed: RunConfig) -> bool:
            return _solve(changed, _roles(changed, role, strict=False), known).fits

        raise ConfigError(refusal(config, worst, fits))
    return solved


def _roles(config: RunConfig, role: str | None, *, strict: bool) -> dict[str, list[Gpu]]:
    """The roles that may share a GPU with `role`, and the GPUs that each of them uses."""
    used = {name: gpus_of(config, name, strict=strict and role in (None, name)) for name in neighbours(config, role)}
    return {name: gpus for name, gpus in used.items() if gpus}


def default_length(config: RunConfig, shape: ModelShape | None = None) -> int | None:
    """rollout.max_model_len where it is not set: the model's own would ask for a cache that a GPU seldom has room for."""
    if shape is None:
        shape = read_shape(config.student.model or "")
    if shape is None:
        return None
    longest = config.longest_completion()
    prompt = config.data.max_prompt_tokens
    length = longest + prompt if prompt is not None else max(_DEFAULT_LENGTH, 2 * longest)
    return min(length, shape.max_positions or length)


# ------------------------------------------------------------------------------------------------ what fits


def _solve(config: RunConfig, roles: Mapping[str, list[Gpu]], shapes: Mapping[str, ModelShape]) -> MemoryPlan:
    """Large sizes that fit, or the least ones where none do; shorter sequences before uncomfortable sizes."""
    plan = None
    for to_floor in (False, True):
        for longest in _lengths(config, shapes):
            plan = _fitted(config, roles, shapes, longest, to_floor=to_floor)
            if plan.fits:
                return plan
    assert plan is not None
    return plan


def _lengths(config: RunConfig, shapes: Mapping[str, ModelShape]) -> Iterator[int]:
    """Longest sequences to try: the one that is set, or those from the default to what leaves room for a short prompt."""
    shape = shapes.get("rollout") or shapes.get("trainer")
    if shape is None:
        limit = shapes["teacher"].max_positions or _DEFAULT_LENGTH
        yield min(config.teacher.max_model_len or _DEFAULT_LENGTH, limit)
        return
    length = config.rollout.max_model_len or default_length(config, shape)
    assert length is not None
    yield length
    if config.rollout.max_model_len is not None or config.data.max_prompt_tokens is not None:
        return
    least = config.longest_completion() + LEAST_PROMPT_TOKENS
    while (length := length // 2) >= least:
        yield length


def _fitted(
    config: RunConfig,
    roles: Mapping[str, list[Gpu]],
    shapes: Mapping[str, ModelShape],
    longest: int,
    *,
    to_floor: bool,
) -> MemoryPlan:
    """Halve what helps most until it fits or nothing helps."""
    shrinkables, sizes = _shrinkables(config, roles, shapes, longest), _start(config, longest)
    sizes = replace(sizes, **{shrinkable.name: shrinkable.start for shrinkable in shrinkables})
    plan = _shares(config, roles, shapes, sizes)
    while not plan.fits:
        smaller = [s for one in shrinkables if (s := one.halve(plan.sizes, to_floor=to_floor)) is not None]
        best = min((_shares(config, roles, shapes, s) for s in smaller), key=_missing, default=plan)
        if _missing(best) >= _missing(plan):
            return plan
        plan = best
    return plan


def _missing(plan: MemoryPlan) -> int:
    return sum(gpu.missing for gpu in plan.gpus)


def _start(config: RunConfig, longest: int) -> Sizes:
    """What the run sets; of a cache that is not shared, nothing."""
    rollout, teacher, pipeline = config.rollout, config.teacher, config.pipeline
    return Sizes(
        max_model_len=longest,
        max_num_seqs=rollout.max_num_seqs or DEFAULT_NUM_SEQS,
        tokens_per_forward=teacher.tokens_per_forward or DEFAULT_TOKENS,
        rows_per_head_chunk=teacher.rows_per_head_chunk or DEFAULT_HEAD_ROWS,
        tokens_per_micro_batch=pipeline.micro_batch_tokens,
    )


def _shrinkables(
    config: RunConfig, roles: Mapping[str, list[Gpu]], shapes: Mapping[str, ModelShape], longest: int
) -> list[Shrinkable]:
    """The sizes that the run does not set, of the roles that are there."""
    rollout, teacher, pipeline = config.rollout, config.teacher, config.pipeline
    found = []
    in_flight = min(rollout.max_num_seqs or DEFAULT_NUM_SEQS, pipeline.prompts_per_step * pipeline.samples_per_prompt)
    new_tokens = in_flight * config.longest_completion()
    for role, name in (("rollout", "kv_tokens"), ("teacher", "teacher_kv_tokens")):
        section = getattr(config, role)
        is_vllm = role == "rollout" or teacher.engine == "vllm"
        others = {gpu for other, gpus in roles.items() if other != role for gpu in gpus}
        is_set = section.kv_cache_gib is not None or section.gpu_memory_utilization is not None
        if is_vllm and not is_set and others.intersection(roles.get(role, ())):
            # Everything in flight at its longest; half of the answers; an eighth, but always one whole sequence.
            sizes = (in_flight * longest, new_tokens // 2, new_tokens // 8)
            found.append(Shrinkable(name, *(max(_least_cache_tokens(longest), size) for size in sizes)))
    if "rollout" in roles and rollout.max_num_seqs is None:
        found.append(Shrinkable("max_num_seqs", DEFAULT_NUM_SEQS, 64, 32))
    if "trainer" in roles and pipeline.tokens_per_micro_batch is None:
        found.append(Shrinkable("tokens_per_micro_batch", DEFAULT_TOKENS, 4096, min(longest, DEFAULT_TOKENS)))
    if "teacher" in roles and teacher.engine == "transformers":
        if teacher.tokens_per_forward is None:
            found.append(Shrinkable("tokens_per_forward", DEFAULT_TOKENS, 4096, min(longest, DEFAULT_TOKENS)))
        if teacher.rows_per_head_chunk is None:
            rows = max(1, min(DEFAULT_HEAD_ROWS, MAX_CHUNK_ELEMENTS // shapes["teacher"].vocab_size))
            found.append(Shrinkable("rows_per_head_chunk", rows, min(rows, 128), min(rows, 64)))
    return found


def _least_cache_tokens(longest: int) -> int:
    """Of one whole sequence, in blocks."""
    return (longest // _CACHE_BLOCK + 2) * _CACHE_BLOCK


def _shares(
    config: RunConfig, roles: Mapping[str, list[Gpu]], shapes: Mapping[str, ModelShape], sizes: Sizes
) -> MemoryPlan:
    gpus = dict.fromkeys(gpu for role in roles for gpu in roles[role])
    parts = []
    for gpu in gpus:
        here = [role for role in roles if gpu in roles[role]]
        parts.append(GpuShares(gpu, {role: _share(config, role, shapes[role], sizes, gpu) for role in here}))
    return MemoryPlan(tuple(parts), sizes)


def _share(config: RunConfig, role: str, shape: ModelShape, sizes: Sizes, gpu: Gpu) -> Share:
    rollout, teacher = config.rollout, config.teacher
    bucket = config.weight_sync.bucket_bytes
    if role == "trainer":
        return trainer_share(shape, sizes, Layout.of(config, *count_ranks(config), on_gpu=True), bucket)
    if role == "teacher" and teacher.engine == "transformers":
        return teacher_share(shape, teacher.dtype, sizes)
    section = rollout if role == "rollout" else teacher
    kv_tokens = sizes.kv_tokens if role == "rollout" else sizes.teacher_kv_tokens
    share = vllm_share(
        shape,
        section.dtype,
        sizes,
        gpu.total_bytes,
        num_gpus=num_parts(config, role),
        kv_tokens=kv_tokens,
        bucket_bytes=bucket if role == "rollout" else 0,
        scores_prompts=role == "teacher",
    )
    tokens = _least_cache_tokens(sizes.max_model_len)
    least = kv_bytes_per_token(shape, section.dtype) * tokens // num_parts(config, role)
    return _as_set(share, section.kv_cache_gib, section.gpu_memory_utilization, least, gpu)


def _as_set(share: Share, kv_gib: float | None, utilization: float | None, least_cache: int, gpu: Gpu) -> Share:
    """The share where its options are set: a cache of that size, or one that fills up that part of the GPU."""
    if kv_gib is not None:
        return replace(share, kv_cache=int(kv_gib * GIB))
    if utilization is not None:
        room = int(utilization * gpu.total_bytes) - (share.total - share.kv_cache)
        return replace(share, kv_cache=max(room, least_cache))
    return share
