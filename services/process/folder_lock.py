"""An output folder belongs to one running process: two that write into one folder would mix their files in silence.

The lock is the kernel's (flock) on `.lock` in the folder, so it ends with the process that holds it, however that ends. Who
lets go removes the file; who gets a lock on one that is no longer there tries again.
"""

import errno
import fcntl
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from services.errors import FolderInUseError, StartupError

logger = logging.getLogger(__name__)

_NAME = ".lock"
_INHERITED = "DISTILLSERVE_FOLDER_LOCK"
_POLL_S = 0.5
_SILENCE_S = 13.0
# What file systems without locks answer.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class FolderLock:
    """A held lock; children that are started with `environment()` and `descriptor` in their pass_fds share it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def environment(self) -> dict[str, str]:
        """What tells a child that it works in this folder on behalf of who holds it."""
        return {_INHERITED: str(self.descriptor)}


@contextmanager
def lock_folder(
    folder: Path, option: str, work: str, on_wait: Callable[[str], None] | None = None
) -> Iterator[FolderLock]:
    """Hold the folder, which is created, for as long as the block runs.

    Args:
        option: what names the folder, e.g. "output.dir", for errors.
        work: what is done in it, for others who want it, e.g. "`distillserve up`".
        on_wait: wait for the holder instead of refusing; told who that is, now and then.

    Raises:
        FolderInUseError: another process holds it; names that process.
        StartupError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inherited = _inherited_descriptor(folder)
        descriptor = _acquire(folder, option, on_wait) if inherited is None else inherited
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise StartupError(f"{option} = {str(folder)!r} cannot be written: {reason}") from error
    if inherited is not None:  # this process outlives its parent when that is killed
        _write_holder(descriptor, f"{_read_holder(descriptor)} and its {work} (process {os.getpid()})")
        yield FolderLock(descriptor)
        return
    try:
        _write_holder(descriptor, f"{work} (process {os.getpid()} on {_since()})")
        yield FolderLock(descriptor)
    finally:
        if _is_the_file(descriptor, folder):  # not where somebody removed the folder, and another process made it anew
            with suppress(OSError):
                (folder / _NAME).unlink()
        os.close(descriptor)


def _acquire(folder: Path, option: str, on_wait: Callable[[str], None] | None) -> int:
    """The descriptor of the locked file."""
    announced = -math.inf
    while True:
        descriptor = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
        is_locked = _locks(descriptor, folder)
        if is_locked and _is_the_file(descriptor, folder):
            return descriptor
        holder = _read_holder(descriptor) or "another process"
        os.close(descriptor)
        if is_locked:
            continue  # its holder removed it in the meantime
        if on_wait is None:
            raise FolderInUseError(
                f"{option} = {str(folder)!r} is in use by {holder}; wait until that has ended, or choose another {option}"
            )
        if time.monotonic() - announced >= _SILENCE_S:
            on_wait(holder)
            announced = time.monotonic()
        time.sleep(_POLL_S)


def _locks(descriptor: int, folder: Path) -> bool:
    """Whether nobody else has the lock, which is then ours."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("the file system of %s has no locks: see to it that no other run uses this folder", folder)
    return True


def _is_the_file(descriptor: int, folder: Path) -> bool:
    """Whether a descriptor is of the folder's lock file as it is now."""
    try:
        ours, there = os.fstat(descriptor), (folder / _NAME).stat()
    except (OSError, OverflowError):  # OverflowError: a number that no descriptor has
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _since() -> str:
    return f"{socket.gethostname()}, since {time.strftime('%H:%M:%S')}"


def _read_holder(descriptor: int) -> str:
    return os.pread(descriptor, 1000, 0).decode(errors="replace").strip()


def _write_holder(descriptor: int, holder: str) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{holder}\n".encode(), 0)
    except OSError:  # a full disk; the lock holds without a name
        return


def _inherited_descriptor(folder: Path) -> int | None:
    """The lock that the process which started this one holds, if it is of this folder."""
    word = os.environ.get(_INHERITED, "")
    if not word.isdecimal() or not _is_the_file(int(word), folder):
        return None
    os.set_inheritable(int(word), False)  # what this process starts works on, maybe for ever, but not in the folder
    return int(word)
