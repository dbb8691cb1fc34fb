"""What a rank of the trainer costs, in lines to log before anything is loaded, on a machine with or without GPUs; and a refusal
where the ranks of a machine need more of its memory than there is."""

from collections.abc import Mapping

from services.config import RunConfig
from services.errors import ConfigError
from services.gpus.advice import updated
from services.gpus.machine_memory import available_bytes
from services.gpus.memory import GIB, Sizes
from services.gpus.plan import Shapes, default_length
from services.gpus.trainer_memory import HostMemory, Layout, host_memory, trainer_share
from services.models.shape import ModelShape, read_shape


def report_cost(
    config: RunConfig,
    num_ranks: int,
    num_local_ranks: int,
    *,
    on_gpu: bool,
    available: int | None = None,
    shapes: Shapes = read_shape,
) -> list[str]:
    """Lines that say what each rank holds and what they need of this machine's memory; none where the student's shape cannot be
    read. To be called on one rank of a machine, before the first of them loads, with what `computed` has filled in.

    Args:
        available: bytes that are left of this machine's memory; default: as the system says.
        shapes: reads the shape of a model.

    Raises:
        ConfigError: the ranks cannot have what they need of this machine's memory.
    """
    shape = shapes(config.student.model or "")
    if shape is None:
        return []
    layout = Layout.of(config, num_ranks, num_local_ranks, on_gpu=on_gpu)
    host = host_memory(shape, layout)
    available = available_bytes() if available is None else available
    if available is not None and host.needed > available:
        raise ConfigError(_refusal(config, shape, layout, host, available))
    passing = _passing(config, shape, layout)
    lines = [_of_rank(shape, layout, passing)]
    left = "" if available is None else f", {available / GIB:.1f} are available"
    lines.append(f"this machine's memory: at least {max(host.needed / GIB, 0.1):.1f} GiB are needed{left}")
    in_all = host.train + sum(passing.values()) * num_local_ranks
    if not on_gpu and available is not None and in_all > available:
        lines.append(
            f"full micro-batches would take {(in_all - available) / GIB:.1f} GiB more than that; lower "
            f"pipeline.tokens_per_micro_batch = {config.pipeline.micro_batch_tokens} if the machine runs out of memory"
        )
    return lines


def _passing(config: RunConfig, shape: ModelShape, layout: Layout) -> Mapping[str, int]:
    """Of a rank's largest micro-batch: no larger than its part of a step."""
    pipeline = config.pipeline
    longest = config.rollout.max_model_len or default_length(config, shape) or 1
    sequences = -(-pipeline.prompts_per_step * pipeline.samples_per_prompt // layout.num_ranks)
    tokens = min(pipeline.micro_batch_tokens, sequences * longest)
    share = trainer_share(shape, Sizes(longest, tokens_per_micro_batch=tokens), layout, config.weight_sync.bucket_bytes)
    return {"head": share.head, "activations": share.activations}


def _of_rank(shape: ModelShape, layout: Layout, passing: Mapping[str, int]) -> str:
    trained = layout.trained_bytes(shape)
    kept = {"parameters": layout.kept_bytes(shape), "gradients": trained, "optimizer": 2 * trained}
    who = f"each of {layout.num_ranks} ranks" if layout.num_ranks > 1 else "the trainer"
    if layout.cpu_offload:
        return f"{who}: {_listed(kept)} in this machine's memory; {_listed(passing)} on its GPU; computed"
    return f"{who}: {_listed({**kept, **passing})}{' on its GPU' if layout.on_gpu else ''}; computed"


def _listed(parts: Mapping[str, int]) -> str:
    (first, size), *others = parts.items()
    unit, of_unit = (
        ("MiB", 2**20) if min(parts.values()) < GIB / 100 else ("GiB", GIB)
    )  # a tiny student has 0.00 GiB of all
    return ", ".join(
        [f"{first} {size / of_unit:.2f} {unit}", *(f"{name} {size / of_unit:.2f}" for name, size in others)]
    )


def _refusal(config: RunConfig, shape: ModelShape, layout: Layout, host: HostMemory, available: int) -> str:
    phase = max(("load", "train", "save"), key=lambda name: getattr(host, name))
    ranks = f"{layout.num_local_ranks} ranks need" if layout.num_local_ranks > 1 else "the trainer needs"
    changes = {
        "set trainer.parallelism = fsdp2": updated(config, "trainer", parallelism="fsdp2"),
        "leave trainer.shard_degree out": updated(config, "trainer", shard_degree=None),
        "set trainer.cpu_offload = false": updated(config, "trainer", cpu_offload=False),
    }
    advice = "take a smaller student.model, a machine with more memory, or more machines"
    for change, changed in changes.items():
        other = Layout.of(changed, layout.num_ranks, layout.num_local_ranks, on_gpu=layout.on_gpu)
        if host_memory(shape, other).needed <= available:
            advice = change
            break
    return (
        f"{ranks} at least {host.needed / GIB:.1f} GiB of this machine's memory to {phase} {config.student.model}, but "
        f"{available / GIB:.1f} are available; {advice}"
    )
