"""What to say when roles do not fit on a GPU: what they need, and one option whose change makes them fit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from services.config import RunConfig
from services.gpus.cards import Gpu, devices_seen, find_gpus
from services.gpus.memory import GIB, Share, usable_bytes
from services.gpus.sharing import SECTIONS

# Room for a prompt, at least, where nothing says how long prompts are.
LEAST_PROMPT_TOKENS = 256

# Options that are computed unless they are set, by the role whose share they change.
_COMPUTED = {
    "rollout": [
        ("rollout", "gpu_memory_utilization"),
        ("rollout", "kv_cache_gib"),
        ("rollout", "max_model_len"),
        ("rollout", "max_num_seqs"),
    ],
    "teacher": [
        ("teacher", "gpu_memory_utilization"),
        ("teacher", "kv_cache_gib"),
        ("teacher", "tokens_per_forward"),
        ("teacher", "rows_per_head_chunk"),
    ],
    "trainer": [
        ("pipeline", "tokens_per_micro_batch"),
        ("student", "gradient_checkpointing"),
        ("trainer", "shard_degree"),
        ("rollout", "max_model_len"),
    ],
}


@dataclass(frozen=True)
class GpuShares:
    """One GPU and what its roles take."""

    gpu: Gpu
    shares: Mapping[str, Share]

    @property
    def needed(self) -> int:
        return sum(share.total for share in self.shares.values())

    @property
    def missing(self) -> int:
        return max(0, self.needed - usable_bytes(self.gpu.total_bytes))


def refusal(config: RunConfig, worst: GpuShares, fits: Callable[[RunConfig], bool]) -> str:
    """One line.

    Args:
        worst: the GPU that lacks most, with the least that its roles need.
        fits: whether a changed run would.
    """
    needs = ", ".join(f"{role} {share.total / GIB:.1f}" for role, share in worst.shares.items())
    advice = next((advice for advice, changed in _changes(config, worst) if fits(changed)), None)
    return (
        f"GPU {worst.gpu.index} has {usable_bytes(worst.gpu.total_bytes) / GIB:.1f} GiB to use, but needed are at least "
        f"{worst.needed / GIB:.1f} ({needs}); {advice or _what_always_helps(config, worst)}"
    )


def _what_always_helps(config: RunConfig, worst: GpuShares) -> str:
    largest = max(worst.shares, key=lambda role: worst.shares[role].total)
    option = f"{SECTIONS[largest]}.cuda_devices"
    if len(worst.shares) > 1 and worst.shares[largest].total <= usable_bytes(worst.gpu.total_bytes):
        return f"give the {largest} a GPU of its own with {option}, or take smaller models"
    is_vllm = largest == "rollout" or (largest == "teacher" and config.teacher.engine == "vllm")
    sizes = {"trainer": "trainer.num_processes"} | ({largest: f"{largest}.tensor_parallel_size"} if is_vllm else {})
    spread = f", or spread it over GPUs with {sizes[largest]}" if largest in sizes else ""
    model = "teacher.model" if largest == "teacher" else "student.model"
    return f"take a smaller {model} or a larger GPU with {option}{spread}"


def _changes(config: RunConfig, worst: GpuShares) -> Iterator[tuple[str, RunConfig]]:
    for role in worst.shares:
        for section, name in _COMPUTED[role]:
            value = getattr(getattr(config, section), name)
            if value is not None:
                advice = f"leave {section}.{name} = {value} out, so that it is computed"
                yield advice, updated(config, section, **{name: None})
    wide = [role for role in ("rollout", "teacher") if getattr(config, role).dtype == "float32"]
    half = config
    for role in wide:
        half = updated(half, role, dtype="bfloat16")
        yield f"set {role}.dtype = bfloat16", updated(config, role, dtype="bfloat16")
    if len(wide) > 1:
        yield "set " + " and ".join(f"{role}.dtype = bfloat16" for role in wide), half
    if config.data.max_prompt_tokens is not None:
        shorter = max(LEAST_PROMPT_TOKENS, config.data.max_prompt_tokens // 4)
        yield f"lower data.max_prompt_tokens to {shorter}", updated(config, "data", max_prompt_tokens=shorter)
    if "trainer" in worst.shares:
        yield from _layouts(config, is_alone=len(worst.shares) == 1 or len(find_gpus(None)) == 1)


def _layouts(config: RunConfig, *, is_alone: bool) -> Iterator[tuple[str, RunConfig]]:
    """Other ways to spread the trainer, the fastest first.

    Args:
        is_alone: whether it has its GPUs for itself, or can have no others; else it is helped by GPUs of its own.
    """
    trainer = config.trainer
    if trainer.parallelism == "ddp" and trainer.num_processes > 1:
        yield "set trainer.parallelism = fsdp2", updated(config, "trainer", parallelism="fsdp2")
    if not is_alone:
        return
    seen = len(find_gpus(devices_seen("student.cuda_devices", config.student.cuda_devices)))
    for number in range(trainer.num_processes + 1, seen + 1):
        more = updated(config, "trainer", num_processes=number, parallelism="fsdp2")
        sharded = "" if trainer.parallelism == "fsdp2" else " and trainer.parallelism = fsdp2"
        yield f"set trainer.num_processes = {number}{sharded}, a GPU each", more
    if not trainer.cpu_offload:
        yield "set trainer.cpu_offload = true, which is slow", updated(config, "trainer", cpu_offload=True)


def updated(config: RunConfig, section: str, **options: object) -> RunConfig:
    """The run with other options in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=options)})
