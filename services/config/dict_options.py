"""Options that are tables, on the command line: a JSON object, or KEY=VALUE with a JSON value, once or several times.

pydantic-settings would take every VALUE for text, and a chat template takes the text "false" for true.
"""

import json
from typing import Any, NoReturn, get_origin

from pydantic import BaseModel

from services.config.passed_on import shown_value
from services.errors import ConfigError


def names_of_tables(settings: type[BaseModel]) -> set[str]:
    """Dotted names of the options of all sections that are tables."""
    return {
        f"{section}.{name}"
        for section, section_field in settings.model_fields.items()
        for name, field in getattr(section_field.annotation, "model_fields", {}).items()
        if get_origin(field.annotation) is dict
    }


def with_tables_as_json(settings: type[BaseModel], options: dict[str, Any]) -> dict[str, Any]:
    """The parsed command line with each table as the text of one JSON object.

    Args:
        options: by dotted name; of a table, a list with an item for each time it was given.

    Raises:
        ConfigError: names the option and what is no JSON in it.
    """
    tables = names_of_tables(settings)
    return {
        name: json.dumps(_table(name, given)) if name in tables and isinstance(given, list) else given
        for name, given in options.items()
    }


def _table(option: str, given: list[str]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for text in given:
        for name, value in _pairs(option, text.strip()):
            if name in table:
                raise ConfigError(f"{option}.{name} is given twice; give it once")
            table[name] = value
    return table


def _pairs(option: str, text: str) -> list[tuple[str, Any]]:
    if text.startswith("{"):
        try:
            # A list instead of an object, so that a name that occurs twice is seen.
            return list(json.loads(text, object_pairs_hook=_Pairs, parse_constant=_refuse_constant).as_given)
        except ValueError as error:
            raise ConfigError(f"{option} is no JSON object ({error}); see `--help` for its form") from error
    pairs = []
    while text:
        name, equals, rest = text.partition("=")
        name = name.strip().strip('"')
        if not equals or not name or text.startswith("["):
            raise ConfigError(
                f"{option} takes a JSON object or KEY=VALUE with a JSON value, e.g. '{{\"key\": 1}}' or key=1"
            )
        value, text = _value(option, name, rest.lstrip())
        pairs.append((name, value))
    return pairs


class _Pairs(dict[str, Any]):
    """A JSON object that remembers what it was given."""

    def __init__(self, as_given: list[tuple[str, Any]]) -> None:
        super().__init__(as_given)
        self.as_given = as_given


def _value(option: str, name: str, text: str) -> tuple[Any, str]:
    """A JSON value, and the text behind it and its comma."""
    try:
        value, end = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode(text)
        rest = text[end:].lstrip()
        if rest and not rest.startswith(","):
            raise ValueError
    except ValueError as error:
        given = text.partition(",")[0]
        quoted = "text" if not shown_value(name, given) else given
        raise ConfigError(
            f"{option}.{name}{shown_value(name, given)} is no JSON: true, false, null and numbers are written so, a text in "
            f"quotes: --{option} '{name}={json.dumps(quoted, ensure_ascii=False)}'"
        ) from error
    return value, rest[1:].lstrip()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
