"""The console script: `services.cli.main`, which takes a while to load."""

import signal


def main() -> None:
    """As `services.cli.main`; a Ctrl-C while it is loaded or leaves ends the process in silence, not with a traceback."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else ignored, or another's
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from services import cli

    during = signal.signal(signal.SIGINT, before)
    try:
        cli.main()
    finally:
        signal.signal(signal.SIGINT, during)
