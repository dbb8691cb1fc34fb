"""`[trainer]`: the ranks over which the student is spread."""

from typing import Literal

from pydantic import Field

from services.config.section import Section


class TrainerConfig(Section):
    """The ranks over which the student is spread: one for each GPU, or each share of a CPU."""

    num_processes: int = Field(1, ge=1)
    """Ranks that `up` starts on this machine; torchrun and `accelerate launch` say themselves how many there are."""
    parallelism: Literal["fsdp2", "ddp"] = "fsdp2"
    """fsdp2 shards parameters, gradients and optimizer state, a layer at a time; ddp keeps all of them on every rank."""
    shard_degree: int | None = Field(None, ge=1)
    """Ranks that hold one copy of the student together under fsdp2; a divisor of their number. Default: those of one machine,
    so that over several machines only gradients travel between them."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory, and bring them to the GPU a layer at a time."""
    watchdog_s: float = Field(300.0, gt=0)
    """How long the event loop beside the learner, or another rank, may show no sign of life before the run ends, seconds. Servers
    have rollout_client.outage_s and teacher_client.outage_s instead."""
