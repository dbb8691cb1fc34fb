"""compose.yaml as Compose reads it, as far as its rules are tested: anchors, merges and the defaults of variables."""

import re
from pathlib import Path
from typing import Any

import yaml

from services.config.roles import Role

CLONE = Path(__file__).parents[3]
GPU_FILE, CPU_FILE = CLONE / "compose.yaml", CLONE / "deploy" / "compose.cpu.yaml"
PROFILE = CLONE / "deploy" / "profiles" / "several-gpus.env"
ROLES: dict[str, Role] = {"rollout": "rollout", "teacher": "teacher", "trainer": "train"}
"""Service and the command that it runs."""
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def variables(path: Path) -> dict[str, str | None]:
    """The variables of a file with their defaults; None: it has none."""
    return {name: default for name, default in _VARIABLE.findall(path.read_text())}


def services(path: Path, environment: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """The services of a file, variables replaced."""
    given = environment or {}
    text = _VARIABLE.sub(lambda match: given.get(match[1]) or match[2] or "", path.read_text())
    return yaml.safe_load(text)["services"]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Sources of a service's volumes by target."""
    found = {}
    for volume in service.get("volumes", []):
        source, target = (
            (volume["source"], volume["target"]) if isinstance(volume, dict) else volume.removesuffix(":ro").split(":")
        )
        found[target] = source
    return found


def profile_environment() -> dict[str, str]:
    lines = (line.partition("=") for line in PROFILE.read_text().splitlines() if line and not line.startswith("#"))
    return {name: value for name, _, value in lines}
