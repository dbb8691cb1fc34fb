"""A command whose standard streams are closed, full, or of an encoding that lacks what is said."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CODE = "import sys\nfrom services.process.streams import *\nset_up_streams()\n"


def run(code: str, *, before: str = "", **options: Any) -> "subprocess.CompletedProcess[str]":
    """`before` is what the shell does with the streams, e.g. ">&-"."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {before}', sys.executable, CODE + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(closed: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    run(f"file = open({str(path)!r}, 'w'); file.write(str(file.fileno()))", before=closed)
    assert int(path.read_text()) > 2


def test_what_an_encoding_lacks_is_spelled_out() -> None:
    done = run("print('ö')", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "\\xf6\n")


def test_what_was_asked_for_and_cannot_be_written_is_an_error() -> None:
    code = (
        "from services.errors import OutputError\ntry:\n with writing_stdout(): print('x')\n"
        "except OutputError as error: print(error, file=sys.stderr)\ngive_up_unwritten(); sys.exit(7)"
    )
    done = run(code, before=">/dev/full")
    assert done.returncode == 7
    assert done.stderr.startswith("standard output cannot be written: No space left") and done.stderr.count("\n") == 1


def test_what_is_only_worth_knowing_does_not_fail() -> None:
    done = run("say('x'); give_up_unwritten(); sys.exit(5)", before=">/dev/full")
    assert (done.returncode, done.stderr) == (5, "")


def test_a_command_that_cannot_print_its_result_says_so_in_one_line() -> None:
    options = ["up", "--dry-run"]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "services.cli", *options]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 7 and done.stderr.count("\n") == 1


def test_a_ctrl_c_while_a_command_is_loaded_shows_no_traceback() -> None:
    code = (
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'services.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "from services.command import main\n"
        "sys.meta_path.insert(0, Interrupts())\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_reader_that_has_gone_away_is_a_broken_pipe_for_what_rich_prints_too() -> None:
    code = (
        "from rich.console import Console\ntry:\n with writing_stdout(): Console().print('x')\n"
        "except BrokenPipeError: sys.exit(5)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", CODE + code], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (5, b"")


def test_a_second_ctrl_c_while_a_command_leaves_shows_no_traceback() -> None:
    code = (
        "import atexit, os, signal\nfrom services.command import main\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code, "up"], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.startswith("distillserve: ") and done.stderr.count("\n") == 1
