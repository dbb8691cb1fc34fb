"""`[teacher_client]`: how the trainer attaches to teachers."""

from typing import Literal

from pydantic import Field

from services.config.client import ClientSection


class TeacherClientConfig(ClientSection):
    """How the trainer attaches to teachers, and which differences to the student it accepts."""

    protocol: Literal["distillserve", "vllm"] = "distillserve"
    """What the servers speak to the trainer; vllm: they are plain `vllm serve`, at temperature 1 only."""
    named: dict[str, list[str]] = {}
    """Further teachers, for the rows that name them (data.teacher_column): the URLs of each by name, as JSON, e.g. {"maths":
    ["http://10.0.0.7:8101"]}. Start each with `distillserve teacher` (`up` does not); they share the key, and this section's
    protocol and times."""
    accept_different: list[Literal["eos", "chat_template"]] = []
    """Differences to the student that are meant: its end tokens, its rendered chat template."""
    probe_every_steps: int = Field(50, ge=0)
    """Steps after which each teacher scores a fixed probe again, which must come out as at the start of the run; it does so
    after an outage in any case. 0: only then."""
    probe_tolerance: float | None = Field(None, gt=0)
    """How far the probe's logprobs may be from those at the start, nats on average; default: three times what asking twice at
    the start shows, from 0.002 (0.05 below float32) to 0.1."""
