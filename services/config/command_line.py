"""Options on the command line: each command takes and shows those of its role, over a run file, over defaults.

argparse carries them; their names, help and parsing are pydantic-settings'.
"""

import argparse
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from services.config.dict_options import with_tables_as_json
from services.config.roles import NEW_NAMES, Role, commands_with, takes, takes_section
from services.config.run import RunConfig
from services.config.run_file import read_run_file, without_faults_of_others
from services.errors import ConfigError, describe_validation_error


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(extra="forbid", protected_namespaces=())


def add_options(parser: argparse.ArgumentParser, role: Role) -> CliSettingsSource[Any]:
    """Give a command the options that its role takes; returns what reads them from the parsed arguments."""
    return CliSettingsSource(
        _options_of(role),
        root_parser=parser,
        cli_hide_none_type=True,
        cli_use_class_docs_for_groups=True,
        cli_parse_none_str="null",
    )


def _options_of(role: Role) -> type[BaseSettings]:
    """RunConfig with the sections and options that a role takes."""
    sections: dict[str, Any] = {}
    for section, field in RunConfig.model_fields.items():
        if not takes_section(role, section):
            continue
        whole: Any = field.annotation
        options = getattr(whole, "model_fields", {})
        taken: dict[str, Any] = {name: (o.annotation, o) for name, o in options.items() if takes(role, section, name)}
        if len(taken) == len(options):
            sections[section] = (whole, field)
        else:
            part = create_model(whole.__name__, __doc__=whole.__doc__, **taken)
            sections[section] = (part, part())
    return create_model("Options", __base__=_Settings, **sections)


def load_config(role: Role, run_file: str | None, source: CliSettingsSource[Any], options: dict[str, Any]) -> RunConfig:
    """Command line over run file over defaults.

    Args:
        source: from `add_options`.
        options: the parsed arguments that are options of the run, by dotted name.

    Raises:
        ConfigError: names every wrong option, its value, what is allowed, and the nearest name for a typo.
    """
    if run_file is not None and not Path(run_file).is_file():
        raise ConfigError(f"the run file {run_file!r} does not exist; see deploy/runs for examples")
    try:
        given = read_run_file(Path(run_file)) if run_file is not None else {}
    except (ValueError, TypeError) as error:  # not TOML, not JSON, or JSON that is no object
        raise ConfigError(f"{run_file}: {error}") from error
    try:
        on_command_line = source(parsed_args=with_tables_as_json(RunConfig, options))()
    except SettingsError as error:
        raise ConfigError(f"{error}; lists and tables are given as JSON, e.g. '[1, 2]' or '{{\"key\": 1}}'") from error
    _refuse_options_of_others(on_command_line, role)
    try:
        merged = _merged(without_faults_of_others(given, role), on_command_line)
        return RunConfig.model_validate(merged, context={"role": role})
    except ValidationError as error:
        raise ConfigError("; ".join(explain(*problem) for problem in describe_validation_error(error))) from error


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables of both are merged as well; of everything else the upper one counts."""
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        merged[name] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _refuse_options_of_others(given: dict[str, Any], role: Role) -> None:
    """Of sections that are given as JSON: argparse knows no names in them."""
    for section, options in given.items():
        for name in options if isinstance(options, dict) else ():
            if f"{section}.{name}" in option_help() and not takes(role, section, name):
                raise ConfigError(unknown_argument(f"--{section}.{name}", role))


def explain(field: str, message: str) -> str:
    """One problem as text, with the nearest option name for an unknown one and the option's help for a bad value."""
    known = option_help()
    if "Extra inputs" in message:
        if field in NEW_NAMES:
            return f"{field} is now {NEW_NAMES[field]}"
        return f"{field} is not an option" + _did_you_mean(field)
    hint = f" ({known[field]})" if known.get(field) else ""
    return f"{field}: {message}{hint}" if field != "(root)" else message


def unknown_arguments(words: list[str], role: Role) -> str:
    """What is wrong with words that argparse knows nothing of; what follows an option is its value."""
    flags = [word for word in words if word.startswith("--")]
    return "; ".join(unknown_argument(word, role) for word in flags or words)


def unknown_argument(word: str, role: Role) -> str:
    """Why a command does not take a word: an option's new name, the commands that take it, or the nearest name for a typo."""
    if not word.startswith("--"):
        return f"{word!r} is one argument too many"
    name = word.removeprefix("--").split("=")[0]
    if name in NEW_NAMES:
        new = NEW_NAMES[name]
        others = "" if takes(role, *new.split(".")) else f", an option of {commands_with(*new.split('.'))}"
        return f"--{name} is now --{new}{others}"
    section, _, option = name.partition(".")
    if section in RunConfig.model_fields and (not option or name in option_help()):
        taken_by = commands_with(section, option)
        return f"--{name} is an option of {taken_by}; leave it out of `distillserve {role}`, whose --help lists its own"
    return f"{word} is not an option" + _did_you_mean(name, prefix="--")


def _did_you_mean(name: str, prefix: str = "") -> str:
    import difflib

    nearest = difflib.get_close_matches(name, [*option_help(), *RunConfig.model_fields, *NEW_NAMES], n=1)
    return f"; did you mean {prefix}{NEW_NAMES.get(nearest[0], nearest[0])}?" if nearest else ""


def option_help() -> dict[str, str]:
    """Dotted name and help text of every option."""
    texts = {}
    for section, section_field in RunConfig.model_fields.items():
        fields: dict[str, Any] = getattr(section_field.annotation, "model_fields", {})
        for name, field in fields.items():
            texts[f"{section}.{name}"] = " ".join((field.description or "").split())
    return texts
