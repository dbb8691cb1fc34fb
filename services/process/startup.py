"""What can be checked before anything slow starts: ports, model folders, room on the disk.

Every failure is one line with the option's name, its value and the fix.
"""

import errno
import os
import shutil
import socket
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from services.errors import StartupError

_MIN_FREE_BYTES = 1 << 30
_LONGEST_SOCKET_PATH = 107  # the kernel's sockaddr_un, less its final zero
# Formats that may run code when they are read, or that only other programs read.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")


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


class PortReservation:
    """A port that no other `up` of this machine takes: between the choice of a port and the moment in which a server listens
    there half a minute may pass, and vLLM shares its port with whoever of the same user listens there as well.

    Held by an abstract socket (Linux), whose name is free again when the process ends, however it ends.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if sys.platform == "linux":
            try:
                self._socket.bind(f"\0distillserve.port.{port}")
            except OSError:
                self._socket.close()
                raise

    def release(self) -> None:
        self._socket.close()


def reserve_port(section: str, host: str, preferred: int) -> PortReservation:
    """`preferred` if nobody listens on or has reserved it, else any free port.

    Raises:
        StartupError: the host is no address of this machine; names the section's option.
    """
    taken: set[int] = set()
    while True:
        port = free_port(host, preferred, frozenset(taken), section)
        try:
            return PortReservation(port)
        except OSError:
            taken.add(port)


def free_port(host: str, preferred: int, taken: frozenset[int] = frozenset(), section: str = "") -> int:
    """`preferred` (0: no preference) if it is free, else any free port; never one of `taken`."""
    if preferred and preferred not in taken:
        try:
            check_port(section, host, preferred)
            return preferred
        except StartupError:
            pass
    while True:
        with bind(section, host, 0) as probe:
            port = probe.getsockname()[1]
        if port not in taken:
            return port


def check_socket_folder() -> None:
    """Refuse a temporary folder whose path leaves no room for the names of the sockets through which vLLM's processes talk.

    Raises:
        StartupError: names the variable, how long it is and how long it may be.
    """
    variable = "VLLM_RPC_BASE_PATH" if os.environ.get("VLLM_RPC_BASE_PATH") else "TMPDIR"
    try:
        folder = os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()
    except OSError as error:
        raise StartupError(
            f"TMPDIR = {os.environ.get('TMPDIR', '')!r}, /tmp and /var/tmp cannot be written; free some space there, or set "
            "TMPDIR to a folder that can"
        ) from error
    length, most = len(os.fsencode(folder)), _LONGEST_SOCKET_PATH - len("/") - len(str(uuid.UUID(int=0)))
    if length > most:
        raise StartupError(
            f"{variable} = {folder!r} is too long a path for the sockets of vLLM's processes: {length} bytes, at most {most}; "
            f"run with {variable}=/tmp"
        )


def check_model_folder(key: str, model: str) -> None:
    """Refuse a path without a model in it; a hub id (`owner/name`) is left to the loader.

    Raises:
        StartupError: names the option and the path.
    """
    path = Path(model)
    if (path / "config.json").is_file() or (not path.exists() and _may_be_hub_id(model)):
        return
    if (path / "adapter_config.json").is_file():
        raise StartupError(
            f"{key} = {model!r} is an adapter without its model; give the model that it was trained for, or one that it is merged "
            "into, such as student/ of a run; a run goes on from an adapter with --lora.adapter"
        )
    reason = "no config.json there" if path.exists() else "it does not exist"
    raise StartupError(
        f"{key} = {model!r} is no model folder ({reason}); give a folder saved with save_pretrained, or a hub id"
    )


def check_weights(key: str, model: str) -> None:
    """Refuse a path without a model that can be loaded; a hub id is left to the loader.

    Raises:
        StartupError: names the option, the path, and what lies there instead of weights in safetensors.
    """
    check_model_folder(key, model)
    path = Path(model)
    if not path.exists() or any(path.glob("*.safetensors")):
        return
    others = sorted(file.name for pattern in _OTHER_WEIGHTS for file in path.glob(pattern))
    found = f"only {others[0]}" if others else "no weights at all"
    raise StartupError(
        f"cannot load the model of {key} = {model!r}: there is {found}, and weights are read from safetensors alone; save it "
        "once more with save_pretrained, which writes safetensors"
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
