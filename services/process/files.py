"""Files that are whole whatever happens while they are written: a full disk, a kill, a power cut."""

import os
from pathlib import Path

from services.errors import OutputError


def cannot_write(path: Path, error: OSError) -> OutputError:
    """What a failed write is reported as."""
    return OutputError(f"{path} cannot be written: {error.strerror or error}; free some space or make it writable")


def write_by_rename(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step; half of it is never there.

    Raises:
        OutputError: the folder cannot be written to; what was at `path` is still there.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file that others may be reading; on failure no part of it stays.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line + b"\n") != len(line) + 1:  # as much as fits is written without an error
                    raise OSError("no space left on its disk")
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


def sync_folder(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
