"""Whose the results are, and keys that stay and that nobody else reads."""

import os
import runpy
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CLONE = Path(__file__).parents[3]
ROOT, CALLER, OTHER = (0, 0), (1234, 1234), (77, 88)


class Stage:
    """The script's folders, with owners that are only written down: changing a real one needs root."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, owners: dict[str, tuple[int, int]]) -> None:
        # Its dataclasses look their module up.
        module = SimpleNamespace()
        monkeypatch.setitem(sys.modules, "prepare", module)
        vars(module).update(runpy.run_path(str(CLONE / "docker" / "prepare.py"), run_name="prepare"))
        self.module: Any = module
        self.owners: dict[str, tuple[int, int]] = {str(path / name): owner for name, owner in owners.items()}
        self.given: dict[str, tuple[int, int]] = {}
        self.path = path
        for name in ("clone", "outputs", "cache/huggingface", "keys/rollout", "keys/teacher"):
            (path / name).mkdir(parents=True)
        self.folders = module.Folders(
            path / "clone", path / "outputs", path / "cache", (path / "keys/rollout", path / "keys/teacher")
        )
        monkeypatch.setattr(
            module.Owner,
            "of",
            lambda place: module.Owner(*self.given.get(str(place), self.owners.get(str(place), ROOT))),
        )
        monkeypatch.setattr(os, "chown", self._chown)

    def _chown(self, place: Path, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        assert not follow_symlinks
        self.given[str(place)] = (uid, gid)

    def run(self) -> tuple[int, int]:
        owner = self.module.prepare(self.folders)
        return owner.uid, owner.gid


@pytest.mark.parametrize(
    ("clone", "outputs", "expected"),
    [
        (CALLER, CALLER, CALLER),
        (CALLER, ROOT, CALLER),  # Docker has just made the folder
        (CALLER, OTHER, OTHER),  # OUTPUTS names a folder of somebody's
        (ROOT, ROOT, ROOT),  # root, or rootless Docker, where the caller is root inside
        (ROOT, OTHER, OTHER),
    ],
)
def test_roles_run_as_whoever_owns_the_results(
    clone: tuple[int, int],
    outputs: tuple[int, int],
    expected: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(tmp_path, monkeypatch, {"clone": clone, "outputs": outputs})
    assert stage.run() == expected
    owned = ["outputs", "cache", "cache/huggingface", "keys/rollout", "keys/rollout/key", "keys/teacher/key"]
    now = {**stage.owners, **stage.given}
    assert {name: now.get(str(tmp_path / name), ROOT) for name in owned} == dict.fromkeys(owned, expected)


def test_results_of_roots_in_somebodys_clone_are_refused_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, monkeypatch, {"clone": CALLER, "outputs": ROOT})
    (tmp_path / "outputs" / "tiny").mkdir()
    with pytest.raises(stage.module.PrepareError, match="sudo chown -R 1234:1234 outputs"):
        stage.run()
    assert not stage.given


def test_keys_are_random_private_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch, {"clone": CALLER, "outputs": CALLER})
    stage.run()
    files = [tmp_path / "keys" / server / "key" for server in ("rollout", "teacher")]
    keys = [file.read_text() for file in files]
    assert keys[0] != keys[1] and all(len(key.strip()) == 64 for key in keys)
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert [path.name for path in file.parent.iterdir()] == ["key"]
        file.chmod(0o644)
    stage.run()
    assert [file.read_text() for file in files] == keys
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)


def test_a_key_that_was_not_written_whole_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch, {"clone": CALLER, "outputs": CALLER})
    (tmp_path / "keys/teacher/key").touch()
    (tmp_path / "keys/teacher/.key.new").touch()
    stage.run()
    assert len((tmp_path / "keys/teacher/key").read_text().strip()) == 64


def test_no_volume_is_left_empty_which_docker_would_give_back_to_the_owner_in_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, monkeypatch, {"clone": CALLER, "outputs": CALLER})
    for folder in (stage.folders.cache, *stage.folders.keys):
        for path in folder.iterdir():
            path.rmdir()
    stage.run()
    assert all(any(folder.iterdir()) for folder in (stage.folders.cache, *stage.folders.keys))


def test_the_keys_are_not_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Stage(tmp_path, monkeypatch, {"clone": CALLER, "outputs": CALLER})
    print(stage.module.prepare(stage.folders))
    output = capsys.readouterr()
    assert (tmp_path / "keys/teacher/key").read_text().strip() not in output.out + output.err
