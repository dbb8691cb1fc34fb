"""Standard input, output and error of a command, whatever the caller has made of them: closed, of another encoding, full."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from services.errors import OutputError
from services.process.files import cannot_write


def set_up_streams() -> None:
    """Make sure that there are all three, and that they take every text.

    Where one was closed (`>&-`), the next file that is opened gets its number, and what is printed goes into that.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # neither closed, which is None, nor a test's
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """Print what is worth knowing, but not worth failing for when the disk of the output is full.

    Raises:
        BrokenPipeError: nobody reads it any more.
    """
    with suppress(OutputError), writing_stdout():
        print(line)


@contextmanager
def writing_stdout() -> Iterator[None]:
    """For what was asked for, printed inside the block.

    Raises:
        OutputError: it cannot be written.
        BrokenPipeError: nobody reads it any more.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except SystemExit:  # rich's answer to a reader that has gone away
        raise BrokenPipeError from None
    except OSError as error:
        raise cannot_write(Path("standard output"), error) from error


def give_up_unwritten() -> None:
    """Drop what could not be written: the interpreter would try once more and end with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
