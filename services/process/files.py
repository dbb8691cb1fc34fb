"""Files that are whole whatever happens while they are written: a full disk, a kill, a power cut."""

import os
from pathlib import Path

import blake3

from services.errors import OutputError

_READ_BYTES = 4 << 20


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
            sync_file(path)


def sync_file(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """As `sync_folder`, and until the names of all files in it are there as well."""
    sync_folder(folder)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_names(path)


def sync_names(folder: Path) -> None:
    """Wait until what was created, renamed or removed in a folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """blake3 of a file, hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    hasher = blake3.blake3()
    with path.open("rb") as file:  # not mapped: the pages would count as this process's memory
        while block := file.read(_READ_BYTES):
            hasher.update(block)
    return hasher.hexdigest()
