"""What of a run's words may be published, and how they stand in markdown: no folder of this machine, no key, no markup.

A run's options hold what its user typed: paths, URLs with passwords, names with quotes and pipes. A model card is read by
everybody.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from services.errors import without_credentials

HIDDEN = "..."
"""Stands for what is not published."""

# Keys of Hugging Face, OpenAI and the like, GitHub, GitLab, Slack, AWS and Google; a JSON web token.
_KEYS = re.compile(
    r"\b(?:(?:hf|sk|ghp|gho|ghs|glpat|xox[abp])[_-][A-Za-z0-9_-]{8,}|github_pat_\w{16,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{20,}|eyJ[\w-]+\.[\w.-]+)"
)
# What follows "?" or "#" in a URL: signatures and keys are sent there.
_QUERY = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://[^\s?#'\"]*)[?#][^\s'\"]*")
# Folders before the last name of a path that begins at the root, a home or a parent; not those of a URL.
_FOLDERS = re.compile(r"(?<![\w:/.~-])(?:file:/*)?(?:~[\w.-]*|\.{1,2})?/(?:[^\s/'\"]+/)*(?=[^\s/'\"])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def is_hub_id(name: str) -> bool:
    """Whether a model or data set is one of the hub's, and no folder or file of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not _exists(name)


def public_name(name: str) -> str:
    """A hub id as it is; of a path the last name; of anything else what `public_text` leaves."""
    if not name or is_hub_id(name):
        return public_text(name)
    if "://" not in name and ("/" in name or _exists(name)):
        name = Path(name).name or Path(name).absolute().name
    return public_text(name)


def public_text(text: str) -> str:
    """One line of text without keys, passwords and folders."""
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written
    text = _CONTROL.sub(" ", text).strip()
    text = _QUERY.sub(rf"\1?{HIDDEN}", without_credentials(text))
    return _FOLDERS.sub("", _KEYS.sub(HIDDEN, text))


def public_value(value: Any) -> Any:
    """As `public_text`, for every text in a JSON value; names in a path of the machine lose their folders."""
    if isinstance(value, str):
        return public_name(value)
    if isinstance(value, Mapping):
        return {public_name(str(name)): public_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [public_value(part) for part in value]
    return value


def code_span(text: str) -> str:
    """Text as a code span of markdown, in which nothing is markup; also in a cell of a table."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text or ' '}{space}{fence}".replace("|", "\\|")


def toml_value(value: Any) -> str:
    """A JSON value without nulls as one line of TOML."""
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{json.dumps(name, ensure_ascii=False)} = {toml_value(part)}" for name, part in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with a null byte
        return False
