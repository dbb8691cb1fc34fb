"""Folders that a start replaces."""

import os
import shutil
from pathlib import Path

import pytest

from services.errors import OutputError
from services.process.files import write_by_rename
from services.process.folders_before import FoldersBefore


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """One with files, one that is not there."""
    data = tmp_path / "data"
    (data / "rows").mkdir(parents=True)
    (data / "rows" / "a").write_text("old")
    (data / "b").write_text("old")
    return data, tmp_path / "models"


def change(data: Path, models: Path) -> None:
    write_by_rename(data / "b", b"new")
    shutil.rmtree(data / "rows")
    (data / "c").write_text("new")
    (models / "student").mkdir(parents=True)
    (models / "student" / "w").write_text("new")


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("is_killed", [False, True])
def test_folders_are_as_they_were(
    is_killed: bool, has_links: bool, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_links:

        def refuse(*_: object) -> None:
            raise PermissionError

        monkeypatch.setattr(os, "link", refuse)
    root, before = folders[0].parent, tree(folders[0].parent)
    kept = FoldersBefore(*folders)
    change(*folders)
    assert "new" in tree(root).values()
    if is_killed:
        kept = FoldersBefore(*folders)
        assert tree(folders[0]) == {"b": "old", "rows/a": "old"} and not folders[1].exists()
    kept.put_back()
    assert tree(root) == before and [path.name for path in root.iterdir()] == ["data"]


def test_what_is_forgotten_is_not_put_back(folders: tuple[Path, Path]) -> None:
    kept = FoldersBefore(*folders)
    change(*folders)
    kept.forget()
    kept.put_back()
    FoldersBefore(*folders).put_back()
    root = folders[0].parent
    assert tree(root) == {"data/b": "new", "data/c": "new", "models/student/w": "new"}
    assert sorted(path.name for path in root.iterdir()) == ["data", "models"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match=r"out/\.data\.part cannot be written"):
        FoldersBefore(tmp_path / "out" / "data")
