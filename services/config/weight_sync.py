"""`[weight_sync]`: how new weights reach the rollout servers."""

from typing import Literal

from pydantic import Field

from services.config.section import Host, Port, Section


class WeightSyncConfig(Section):
    """How new weights reach the rollout server."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl when student.cuda_devices and rollout.cuda_devices are set, of one kind (numbers or UUIDs) and disjoint,
    else gloo through host memory."""
    bucket_mib: int = Field(256, ge=1)
    """Weights sent in one broadcast, MiB."""
    stage_timeout_s: float = Field(120.0, gt=0)
    """Deadline of each stage of a push, seconds."""
    master_address: Host = "127.0.0.1"
    """Address of the trainer's machine at which rollout servers reach it, and on which it listens for them."""
    master_port: Port | None = None
    """TCP port there; default: any free one."""
    take_over: bool = False
    """Take rollout servers from a run that holds them and lives; it then ends."""
    lease_s: float = Field(30.0, ge=1, le=3600)
    """Silence after which rollout servers count this run as gone, seconds; it speaks six times as often."""
    canary_prompts: int = Field(2, ge=1)
    """Prompts with completions whose logprobs the servers and the trainer compare after each push."""
    canary_tolerance: float | None = Field(None, gt=0)
    """Largest difference of a canary logprob, a mean where the rollouts or the student's compute_dtype are in half precision;
    default: three times what the first push showed, in float32 from 1e-4 to 1e-2, in half precision from 0.05 to 0.1."""

    @property
    def bucket_bytes(self) -> int:
        return self.bucket_mib << 20
