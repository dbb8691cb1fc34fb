"""`[teacher_client]`: how the trainer attaches to teachers."""

from typing import Literal

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
