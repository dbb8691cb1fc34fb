"""A process that is killed, or whose disk is full, at the n-th thing that it does to a file."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from trainer.checkpoint import rank_file

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# A full disk still lets go of files.
_NEEDS_ROOM = ("open", "os.mkdir", "os.rename", "fsync", "safetensors")

DONE, REFUSED, FAILED = 0, 40, 41


class _Points:
    def __init__(self, act: Callable[[str, int], None]) -> None:
        self.count, self._act = 0, act

    def reach(self, event: str) -> None:
        self.count += 1
        self._act(event, self.count)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES):
            self.reach(event)

    def watch(self) -> None:
        """Of this process, for ever."""
        sys.addaudithook(self.audit)
        fsync, save_file = os.fsync, rank_file.save_file

        def watched_fsync(descriptor: int) -> None:
            self.reach("fsync")
            fsync(descriptor)

        def watched_save(*arguments: Any) -> None:
            self.reach("safetensors")
            save_file(*arguments)

        os.fsync, rank_file.save_file = watched_fsync, watched_save


def _kill_at(number: int) -> Callable[[str, int], None]:
    return lambda event, count: os.kill(os.getpid(), signal.SIGKILL) if count == number else None


def _full_from(number: int) -> Callable[[str, int], None]:
    def act(event: str, count: int) -> None:
        if count >= number and event in _NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return act


def in_child(
    work: Callable[[], None], refusal: type[BaseException], act: Callable[[str, int], None]
) -> tuple[int, int]:
    """How a copy of this process ends that does `work`, and how many points it has come to.

    Returns:
        DONE, REFUSED where it raised a `refusal`, FAILED by anything else, or minus the signal that killed it.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, points = FAILED, _Points(act)
        try:
            signal.alarm(120)
            points.watch()
            work()
            code = DONE
        except refusal:
            code = REFUSED
        finally:
            os.write(writer, str(points.count).encode())
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    count = os.read(reader, 20)
    os.close(reader)
    return os.waitstatus_to_exitcode(status), int(count or 0)


def count_points(work: Callable[[], None]) -> int:
    """How many points there are."""
    code, count = in_child(work, KeyboardInterrupt, lambda event, number: None)
    assert code == DONE and count > 0, code
    return count


def killed_at(number: int, work: Callable[[], None]) -> None:
    """Do `work` in a process that is killed just before its n-th change of a file."""
    code, _ = in_child(work, KeyboardInterrupt, _kill_at(number))
    assert code == -signal.SIGKILL, code


def full_from(number: int, work: Callable[[], None], refusal: type[BaseException]) -> int:
    """Do `work` in a process whose disk is full from its n-th change of a file on; returns how it ends."""
    return in_child(work, refusal, _full_from(number))[0]
