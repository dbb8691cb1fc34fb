"""Run files: TOML, or JSON where the name says so, as `up` and --dry-run write it."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from services.config.roles import Role, takes, takes_section
from services.config.run import RunConfig
from services.strict_json import parse_json, without_bom


def read_run_file(path: Path) -> dict[str, Any]:
    """What a run file gives, by section.

    Raises:
        ValueError: it is not what its name says, or holds no object.
    """
    content = without_bom(path.read_bytes())
    given = parse_json(content) if path.suffix == ".json" else tomllib.loads(content.decode())
    if not isinstance(given, dict):
        raise ValueError(f"it holds a {type(given).__name__}; give an object, by section")
    return given


def without_faults_of_others(given: dict[str, Any], role: Role) -> dict[str, Any]:
    """A run file without what is wrong in it for other roles than this one, which refuse it themselves.

    A name that is no option stays where the role takes options of its section: it may have been meant for this role.
    """
    try:
        RunConfig.model_validate(given, context={"role": None})
    except ValidationError as error:
        kept = {name: dict(section) if isinstance(section, dict) else section for name, section in given.items()}
        for problem in error.errors():
            section, *rest = map(str, problem["loc"])
            if section in RunConfig.model_fields and not takes_section(role, section):
                kept.pop(section, None)
            elif rest and problem["type"] != "extra_forbidden" and not takes(role, section, rest[0]):
                kept[section].pop(rest[0], None)
        return kept
    return given
