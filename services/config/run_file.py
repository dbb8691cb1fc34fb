"""A run file, TOML or JSON, as pydantic-settings' source of options: in UTF-8, with or without a BOM."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, JsonConfigSettingsSource, TomlConfigSettingsSource
from pydantic_settings.sources import PydanticBaseSettingsSource

from services.strict_json import parse_json, without_bom


class _Toml(TomlConfigSettingsSource):
    def _read_file(self, file_path: Any) -> dict[str, Any]:
        return tomllib.loads(without_bom(file_path.read_bytes()).decode())


class _Json(JsonConfigSettingsSource):
    def _read_file(self, file_path: Any) -> dict[str, Any]:
        return parse_json(without_bom(file_path.read_bytes()))


def run_file_source(settings: type[BaseSettings], run_file: str) -> PydanticBaseSettingsSource:
    """The options that a run file gives; its name says whether it is JSON.

    Raises:
        ValueError, TypeError: it is not what its name says, or holds no object.
    """
    if run_file.endswith(".json"):
        return _Json(settings, json_file=Path(run_file))
    return _Toml(settings, toml_file=Path(run_file))
