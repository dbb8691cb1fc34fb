"""A folder belongs to one process, and to what that process starts."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.errors import FolderInUseError, StartupError
from services.process import folder_lock
from services.process.folder_lock import lock_folder

HOLDS = """
import sys, time
from pathlib import Path
from services.process.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1]), "output.dir", "`a test`"):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_who_holds_a_folder_is_named_to_the_next_and_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    process = holder(tmp_path)
    expected = rf"^output\.dir = '{tmp_path}' is in use by `a test` \(process {process.pid} on .*, since .*\); wait"
    with pytest.raises(FolderInUseError, match=expected), lock_folder(tmp_path, "output.dir", "me"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    with lock_folder(tmp_path, "output.dir", "me"):
        assert "me (process " in (tmp_path / ".lock").read_text()


def test_nothing_of_a_lock_is_left_in_the_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "output.dir", "me"):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder of before lets go between our opening the file and our lock on it."""
    flock, removed = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            (tmp_path / ".lock").unlink()
            removed.append(True)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock_folder(tmp_path, "output.dir", "me"):
        monkeypatch.undo()
        with pytest.raises(FolderInUseError, match="in use by me"), lock_folder(tmp_path, "output.dir", "another"):
            pass


def test_a_fault_inside_is_not_taken_for_one_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock_folder(tmp_path, "output.dir", "parent") as lock:
        for word in ({}, lock.environment()):
            for name, value in word.items():
                monkeypatch.setenv(name, value)
            folder = tmp_path if word else tmp_path / "other"
            with pytest.raises(FileNotFoundError), lock_folder(folder, "output.dir", "me"):
                raise FileNotFoundError("mine")


def test_who_waits_is_told_of_the_holder_now_and_then_and_goes_on_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "_SILENCE_S", 0.0)
    monkeypatch.setattr(folder_lock, "_POLL_S", 0.0)
    process, told = holder(tmp_path), []

    def on_wait(who: str) -> None:
        told.append(who)
        if len(told) == 3:
            process.kill()
            process.wait(10)

    with lock_folder(tmp_path, "--output", "me", on_wait=on_wait):
        assert len(told) == 3 and told[0].startswith(f"`a test` (process {process.pid} ")


def stranger(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DISTILLSERVE_FOLDER_LOCK")
        with lock_folder(folder, "output.dir", "stranger"):
            pass


def test_a_child_works_in_the_folder_of_its_parent_and_in_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    with lock_folder(mine, "output.dir", "parent") as lock:
        (word,) = lock.environment().items()
        monkeypatch.setenv(*word)
        os.set_inheritable(lock.descriptor, True)  # as in a child
        with lock_folder(mine, "output.dir", "child"):
            assert not os.get_inheritable(lock.descriptor)
        with pytest.raises(
            FolderInUseError, match=r"in use by parent \(process .*\) and its child \(process \d+\); wait"
        ):
            stranger(mine)
        process = holder(other)
        with pytest.raises(FolderInUseError), lock_folder(other, "output.dir", "child"):
            pass
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("word", ["", "x", "-1", "99999", "9" * 30])
def test_a_descriptor_that_is_none_is_no_lock(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = holder(tmp_path)
    monkeypatch.setenv("DISTILLSERVE_FOLDER_LOCK", word)
    with pytest.raises(FolderInUseError), lock_folder(tmp_path, "output.dir", "me"):
        pass
    process.kill()
    process.wait(10)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "out"
    with pytest.raises(StartupError, match=rf"output\.dir = '{folder}' cannot be written: Not a directory"):
        lock_folder(folder, "output.dir", "me").__enter__()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with lock_folder(tmp_path, "output.dir", "me"):
        assert f"the file system of {tmp_path} has no locks" in caplog.text


def test_a_path_that_no_file_system_takes_is_refused() -> None:
    expected = r"^output\.dir = 'a.*b' cannot be written: embedded null byte$"
    with pytest.raises(StartupError, match=expected), lock_folder(Path("a\0b"), "output.dir", "me"):
        pass


def test_who_leaves_a_folder_that_was_made_anew_leaves_the_lock_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with lock_folder(folder, "output.dir", "first"):
        shutil.rmtree(folder)
        process = holder(folder)
    with pytest.raises(FolderInUseError, match=f"process {process.pid} "), lock_folder(folder, "output.dir", "third"):
        pass
    process.kill()
    process.wait(10)
