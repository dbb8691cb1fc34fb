"""What the rollout server is told of a push: `POST /v1/weights/...`."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from services.wire.message import TokenIds, WireModel
from services.wire.policy_label import PolicyLabel, RunId

NOT_HELD = "Not held"
"""Title of the problem document (409) for a run that does not hold the server, which nobody does."""


class WeightCall(WireModel):
    """What every `POST /v1/weights/...` says: the run that holds the server."""

    run: RunId


class HoldRequest(WeightCall):
    """`POST /v1/weights/hold`: take the server for a run, or renew its lease."""

    name: str = Field(min_length=1, max_length=300)
    """What a person knows the run by."""
    lease_s: float = Field(gt=0, le=3600, allow_inf_nan=False)
    """Silence after which the run counts as gone, seconds."""
    take_over: bool = False
    """Take it from a run that lives."""


class ConnectRequest(WeightCall):
    """`POST /v1/weights/connect`: join the trainer's group."""

    rendezvous: dict[str, Any]
    timeout_s: float = Field(gt=0, allow_inf_nan=False)
    """Deadline of this and of every later stage, seconds."""


class PauseRequest(WeightCall):
    """`POST /v1/weights/pause`: admit no more completions, wait for those in flight."""

    drain_s: float = Field(gt=0, allow_inf_nan=False)
    """How long to wait for them, seconds."""


class ReceiveRequest(WeightCall):
    """`POST /v1/weights/receive`: receive and load one push; answers what each worker got."""

    update: dict[str, Any]


class FinishRequest(WeightCall):
    """`POST /v1/weights/finish`: the weights are whole, and called `label` from now on."""

    label: str

    @field_validator("label")
    @classmethod
    def _check(cls, label: str) -> str:
        PolicyLabel.parse(label)
        return label


class CanaryRequest(WeightCall):
    """`POST /v1/weights/canary`: score given tokens under the new weights, before anybody samples under them."""

    sequences: Annotated[list[Annotated[TokenIds, Field(min_length=2)]], Field(fail_fast=True)] = Field(min_length=1)


class CanaryScores(WireModel):
    """Its answer."""

    policy_version: str
    """The label under which each engine scored."""
    token_logprobs: list[list[list[float]]]
    """For each data-parallel engine and sequence, the logprobs of all its tokens but the first."""
