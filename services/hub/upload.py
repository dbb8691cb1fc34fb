"""What of a folder of weights is uploaded, under which name, and what it replaces."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from services.config.output_dir import RESUME
from services.errors import DataError
from services.hub.cast import Cast, index_name, plan_cast, with_dtype
from services.hub.public_text import public_name
from services.hub.run_folder import What

CARD = "README.md"

_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken", "LICENSE*")
"""Files of configuration, tokenizer, chat templates and a model's own code."""
_TOKENIZER = (
    *("tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "*.jinja"),
)
"""Those of them that a tokenizer has written."""
_INDEX = ".safetensors.index.json"
_REPLACED = ("*.safetensors", f"*{_INDEX}", "pytorch_model*.bin*", "adapter_config.json", "adapter_model.bin")
"""What an earlier push may have left: from_pretrained would load it instead of what is pushed."""


@dataclass(frozen=True)
class Upload:
    """Files by the name that they get: where they are, or what is in them.

    Attributes:
        cast: makes more of them; None where the weights stay as they are.
    """

    files: dict[str, Path | bytes]
    cast: Cast | None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, in order of the names; those of the copy in another dtype without their headers."""
        sizes = {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }
        return dict(sorted({**sizes, **(self.cast.sizes if self.cast else {})}.items()))

    def names(self) -> set[str]:
        """Names of all files in the repository."""
        made = set(self.cast.sizes) if self.cast else set()
        if self.cast and self.cast.split.is_sharded:
            made.add(index_name(next(iter(self.cast.sizes)), self.cast.split))
        return made | set(self.files)


def plan_upload(folder: Path, what: What, dtype: str | None, card: str) -> Upload:
    """The files of a folder of weights, with a card, without names of folders of this machine.

    Args:
        dtype: of the weights; default: as they are.

    Raises:
        DataError: a file is damaged.
    """
    weights = _weights(folder, what)
    cast = plan_cast([folder / name for name in weights], dtype) if dtype else None
    files: dict[str, Path | bytes] = {} if cast else {name: folder / name for name in weights}
    for name, path in _others(folder):
        if not (cast and name.endswith(_INDEX)):
            files[name] = _public_config(path, dtype if cast else None) if name.endswith("config.json") else path
    if what == "adapter":  # its tokenizer is with the student around it
        student = _others(folder.parent)
        files |= {name: path for name, path in student if any(fnmatch(path.name, one) for one in _TOKENIZER)}
    files[CARD] = card.encode()
    return Upload(files, cast)


def replaced(existing: Iterable[str], upload: Upload) -> list[str]:
    """Names in a repository that must go, for they would be loaded beside or instead of what is uploaded."""
    new = upload.names()
    return [name for name in existing if name not in new and any(fnmatch(name, pattern) for pattern in _REPLACED)]


def _weights(folder: Path, what: What) -> list[str]:
    """Files of weights; others beside them may be of an optimizer."""
    stem = "adapter_model" if what == "adapter" else "model"
    index = folder / f"{stem}{_INDEX}"
    if index.is_file():
        names = sorted(set(_read_json(index)["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob(f"{stem}*.safetensors"))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{folder / absent[0]} is missing; save the student again")
    if not names:
        raise DataError(f"{folder} holds no {stem}.safetensors; save the student again")
    return names


def _others(folder: Path) -> list[tuple[str, Path]]:
    """Names and paths of what is no weights; an adapter in a folder of its own has no part in the model around it."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        inside = [parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder]
        is_other_model = any((parent / "adapter_config.json").exists() for parent in inside)
        is_of_run = folder / RESUME in path.parents  # what a checkpoint has beside its student
        if not path.is_file() or is_other_model or is_of_run or any(part.startswith(".") for part in Path(name).parts):
            continue
        if any(fnmatch(path.name, pattern) for pattern in _BESIDE_WEIGHTS):
            found.append((name, path))
    return found


def _public_config(path: Path, dtype: str | None) -> Path | bytes:
    """A file of configuration; what is in it where that had to be changed."""
    content = _read_json(path)
    public = _without_folders(with_dtype(content, dtype) if dtype else content)
    return path if public == content else (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: public_name(part)
            if name.endswith("name_or_path") and isinstance(part, str)
            else _without_folders(part)
            for name, part in value.items()
        }
    return [_without_folders(part) for part in value] if isinstance(value, list) else value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; save the student again") from error
