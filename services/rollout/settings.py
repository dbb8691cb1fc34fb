"""What the middleware inside vLLM's process must know of the run; vLLM constructs it without arguments.

`services.rollout.server` writes these into the environment of the process that it becomes.
"""

import os
from dataclasses import dataclass
from typing import Self

from pydantic import TypeAdapter

from services.config import RunConfig
from services.gpus.sharing import gpus_of

_VARIABLE = "DISTILLSERVE_ROLLOUT_SETTINGS"


@dataclass(frozen=True)
class RolloutSettings:
    model: str
    backend: str  # weight transfer engine, "gloo" or "nccl"
    max_logprobs: int
    max_completions_per_request: int
    max_body_bytes: int
    max_pending_requests: int = 64
    transfer_timeout_s: float = 120.0
    port: int = 0  # names the file of the key that the server makes when it was given none
    gpu_uuids: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls(
            model=config.student.model or "",
            backend=config.weight_sync_backend(),
            max_logprobs=config.rollout.max_logprobs,
            max_completions_per_request=config.rollout.max_completions_per_request,
            max_body_bytes=config.rollout.max_body_mib << 20,
            max_pending_requests=config.rollout.max_pending_requests,
            transfer_timeout_s=config.rollout.transfer_timeout_s,
            port=config.rollout.port,
            gpu_uuids=tuple(gpu.uuid for gpu in gpus_of(config, "rollout", strict=False)),
        )

    @classmethod
    def from_environment(cls) -> Self:
        return TypeAdapter(cls).validate_json(os.environ[_VARIABLE])

    def to_environment(self) -> dict[str, str]:
        return {_VARIABLE: TypeAdapter(type(self)).dump_json(self).decode()}
