"""Which options the command of a role takes: those that its code reads.

A run file holds the sections of all roles. A server also reads what the others may take of a GPU that they share, but from
the file alone (services/gpus/plan.py), and starts whatever is wrong there.
"""

from collections.abc import Mapping
from typing import Literal, get_args

Role = Literal["up", "rollout", "teacher", "train"]

_EVERY: frozenset[str] = frozenset()
"""Stands for every option of a section."""

_TAKEN: dict[Role, Mapping[str, frozenset[str]]] = {
    "rollout": {
        "rollout": _EVERY,
        "student": frozenset({"model", "trust_remote_code", "cuda_devices"}),
        "teacher": frozenset({"cuda_devices"}),
        "sampling": frozenset({"max_new_tokens"}),
        "evaluation": frozenset({"max_new_tokens"}),
        "data": frozenset({"max_prompt_tokens"}),
        "weight_sync": frozenset({"backend", "bucket_mib"}),
    },
    "teacher": {
        "teacher": _EVERY,
        "student": frozenset({"cuda_devices"}),
        "rollout": frozenset({"cuda_devices"}),
    },
    "train": {
        "student": _EVERY,
        "rollout_client": _EVERY,
        "rollout": frozenset({"host", "port", "dtype", "cuda_devices", "max_model_len"}),
        "teacher_client": _EVERY,
        "teacher": frozenset({"host", "port", "model", "trust_remote_code", "cuda_devices"}),
        **dict.fromkeys(
            (
                *("trainer", "data", "sampling", "loss", "reward", "optimizer", "lora", "pipeline"),
                *("weight_sync", "evaluation", "output", "seed"),
            ),
            _EVERY,
        ),
    },
    "up": {"up": _EVERY},  # and all of the others'
}
_MOVED = {
    "rollout": ("urls", "startup_timeout_s", "request_timeout_s", "outage_s"),
    "teacher": (
        *("urls", "startup_timeout_s", "request_timeout_s", "outage_s"),
        *("protocol", "named", "accept_different"),
    ),
}
NEW_NAMES = {f"{role}.{name}": f"{role}_client.{name}" for role, names in _MOVED.items() for name in names}
"""Options of the trainer that were in the sections of the servers."""


def takes_section(role: Role, section: str) -> bool:
    """Whether a role takes options of a section at all."""
    return role == "up" or section in _TAKEN[role]


def takes(role: Role, section: str, option: str) -> bool:
    """Whether a role takes an option of a section."""
    if role == "up":
        return True
    names = _TAKEN[role].get(section)
    return names is not None and (names == _EVERY or option in names)


def commands_with(section: str, option: str = "") -> str:
    """The commands that take an option, or all of a section, as text."""
    *others, last = (f"`distillserve {role}`" for role in get_args(Role) if takes(role, section, option))
    return f"{', '.join(others)} and {last}" if others else last
