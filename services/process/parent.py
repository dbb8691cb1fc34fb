"""A process that ends when the one that started it does, also when that one is killed without a chance to do anything."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

# Looked up here, for between a fork and what follows it the loader's lock may be held.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Let the kernel send `number` to the calling process when its parent ends (Linux alone).

    What counts is the thread that started this process: when it ends, so does its parent, as the kernel sees it.

    Args:
        parent: process id of the parent; where that one is gone already, the calling process ends at once.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        os._exit(128 + number)
