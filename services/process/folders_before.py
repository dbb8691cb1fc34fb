"""Folders that a start replaces, as they were before it, until it is certain that the start succeeds."""

import os
import shutil
from pathlib import Path

from services.process.files import cannot_write


class FoldersBefore:
    """Puts folders back as they were, unless that is forgotten first.

    Of each a tree of hard links is beside it, for the files in them are replaced and never changed. After a kill it is still there,
    and the next one puts it back.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self.put_back()
        for folder in folders:
            part = _beside(folder, "part")
            try:
                shutil.rmtree(part, ignore_errors=True)
                if folder.is_dir():
                    shutil.copytree(folder, part, symlinks=True, copy_function=_link)
                else:
                    part.mkdir(parents=True)
                part.replace(_beside(folder, "before"))
            except shutil.Error as error:
                raise cannot_write(part, OSError(str(error))) from error
            except OSError as error:
                raise cannot_write(part, error) from error

    def put_back(self) -> None:
        """Let the folders be as they were; one that was not there is gone."""
        for folder in self._folders:
            before = _beside(folder, "before")
            if not before.is_dir():
                continue
            try:
                shutil.rmtree(folder, ignore_errors=True)
                before.replace(folder)
                if not any(folder.iterdir()):
                    folder.rmdir()
            except OSError as error:
                raise cannot_write(folder, error) from error

    def forget(self) -> None:
        """Let the folders stay as they are."""
        for folder in self._folders:
            before, part = _beside(folder, "before"), _beside(folder, "part")
            if before.is_dir():
                before.replace(part)  # half of it is never put back
                shutil.rmtree(part, ignore_errors=True)


def _beside(folder: Path, end: str) -> Path:
    return folder.with_name(f".{folder.name}.{end}")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # some file systems have no links
        shutil.copy2(source, target)
