"""How a test's process that was a rank of a gloo group ends."""

import os
import sys
from typing import NoReturn


def leave() -> NoReturn:
    """Leave with 0 and without torch's own end of a group, which aborts now and then: "terminate called without an active
    exception" (torch 2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
