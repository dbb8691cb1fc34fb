"""What can be checked before anything slow starts: ports, model folders, room on the disk.

Every failure is one line with the option's name, its value and the fix.
"""

import shutil
import socket
from pathlib import Path

from services.errors import StartupError

_MIN_FREE_BYTES = 1 << 30


def bind(section: str, host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening.

    Raises:
        StartupError: the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartupError(
            f"{section}.port = {port} cannot be used on {host}: {error.strerror}; stop the program that listens "
            f"there or pass --{section}.port with a free port"
        ) from error
    return listener


def check_port(section: str, host: str, port: int) -> None:
    """Refuse a port that another program has.

    Raises:
        StartupError: the port cannot be had.
    """
    bind(section, host, port).close()


def free_port(host: str, preferred: int, taken: frozenset[int] = frozenset()) -> int:
    """`preferred` (0: no preference) if it is free, else any free port; never one of `taken`."""
    if preferred and preferred not in taken:
        try:
            check_port("", host, preferred)
            return preferred
        except StartupError:
            pass
    while True:
        with bind("", host, 0) as probe:
            port = probe.getsockname()[1]
        if port not in taken:
            return port


def check_model_folder(key: str, model: str) -> None:
    """Refuse a path without a model in it; a hub id (`owner/name`) is left to the loader.

    Raises:
        StartupError: names the option and the path.
    """
    path = Path(model)
    is_hub_id = not path.exists() and not model.startswith((".", "/", "~")) and model.count("/") <= 1
    if not is_hub_id and not (path / "config.json").is_file():
        reason = "no config.json there" if path.exists() else "it does not exist"
        raise StartupError(
            f"{key} = {model!r} is no model folder ({reason}); give a folder saved with save_pretrained, or a hub id"
        )


def check_output_room(path: Path) -> None:
    """Create the output folder and make sure that a run fits.

    Raises:
        StartupError: it cannot be written, or less than 1 GiB is left.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".write-probe"
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise StartupError(f"output.dir = {str(path)!r} cannot be written: {error.strerror or error}") from error
    if free < _MIN_FREE_BYTES:
        raise StartupError(
            f"output.dir = {str(path)!r} has {free >> 20} MiB left on its disk, a run needs at least "
            f"{_MIN_FREE_BYTES >> 20}; free some or pass --output.dir on another disk"
        )
