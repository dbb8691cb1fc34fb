"""Whole files or none, also where the disk is full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.errors import OutputError
from services.process.files import append_line, write_by_rename


def test_lines_are_added(tmp_path: Path) -> None:
    append_line(tmp_path / "f", b"one")
    append_line(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"one\ntwo\n"


# A limit on the size of files stands for the end of the disk: the kernel writes as much as fits, then refuses.
APPENDING = """
import resource, signal, sys
from pathlib import Path
from services.errors import OutputError
from services.process.files import append_line, write_by_rename
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
path = Path(sys.argv[1])
try:
    for _ in range(20):
        if sys.argv[2] == "append":
            append_line(path, b"0123456789" * 3)
        else:
            write_by_rename(path, b"0" * 200)
except OutputError as error:
    print(error)
"""


def test_a_line_that_does_not_fit_leaves_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    said = subprocess.run([sys.executable, "-c", APPENDING, path, "append"], capture_output=True, text=True, timeout=60)
    assert f"{path} cannot be written" in said.stdout and said.stderr == ""
    assert path.read_bytes() == (b"0123456789" * 3 + b"\n") * 3


def test_a_file_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_by_rename(path, b"before")
    said = subprocess.run([sys.executable, "-c", APPENDING, path, "rename"], capture_output=True, text=True, timeout=60)
    assert f"{path} cannot be written" in said.stdout
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_power_cut_finds_the_whole_file_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_by_rename(path, b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="f cannot be written: No space left on device"):
        write_by_rename(path, b"after")
    assert path.read_bytes() == b"before"


def test_a_folder_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    for write in (append_line, write_by_rename):
        with pytest.raises(OutputError, match="No such file or directory"):
            write(tmp_path / "no" / "f", b"x")
