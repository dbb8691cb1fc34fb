"""What can be checked before anything slow starts: ports, model folders, room on the disk.

Every failure is one line with the option's name, its value and the fix.
"""

import errno
import shutil
import socket
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from services.errors import StartupError

_MIN_FREE_BYTES = 1 << 30


def bind(section: str, host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening.

    Raises:
        StartupError: the port cannot be had, or the host is no address of this machine.
    """
    try:
        family, address = socket_address(host, port)
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:  # no such name, or a kernel without IPv6
        raise _not_ours(section, host, error) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise _not_ours(section, host, error) from error
        fix = (
            "ports below 1024 are the system's"
            if error.errno == errno.EACCES
            else "stop the program that listens there"
        )
        raise StartupError(
            f"{section}.port = {port} cannot be used on {host}: {error.strerror}; {fix}, or pass --{section}.port with a free port"
        ) from error
    return listener


def socket_address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Family and address for a socket, zone included; of a name with both families IPv4, on which vLLM listens too.

    Raises:
        OSError: there is no such name.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address


def _not_ours(section: str, host: str, error: OSError) -> StartupError:
    option = f"{section}.host" if section else "host"
    return StartupError(
        f"{option} = {host!r} cannot be listened on: {error.strerror}; give an address of this machine, such as 127.0.0.1, or "
        "0.0.0.0 for all of them"
    )


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
    if (path / "config.json").is_file() or (not path.exists() and _may_be_hub_id(model)):
        return
    reason = "no config.json there" if path.exists() else "it does not exist"
    raise StartupError(
        f"{key} = {model!r} is no model folder ({reason}); give a folder saved with save_pretrained, or a hub id"
    )


def _may_be_hub_id(model: str) -> bool:
    """Whether somebody can have meant a model of the hub: "outputs/student" is a path where there is a folder "outputs"."""
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    owner, slash, _ = model.partition("/")
    return model[0] not in ".~" and not (slash and Path(owner).exists())


def hub_hint(model: str) -> str:
    """What to add to an error about a model that could not be loaded: that it was looked for at the hub, if it was."""
    return "" if Path(model).exists() else f"; there is no folder {model!r} here, so it was taken for a hub id"


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
