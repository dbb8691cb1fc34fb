"""The key that a rollout server makes when it was given none: it lies in a file that only its user can read.

Whoever reaches a rollout server can stop a run or replace its weights, and every program and web page on a machine reaches
its loopback. A trainer of the same user on the same machine finds the file by the server's port.
"""

import os
import platform
import tempfile
from collections.abc import Generator
from pathlib import Path

import httpx

from services.config.addresses import is_loopback
from services.config.keys import key_headers, make_key
from services.errors import InputError, StartupError

_OTHERWISE = "make the folder writable, or set DISTILLSERVE_ROLLOUT_KEY for the server and the trainer"


def own_key_path(port: int) -> Path:
    """Where the server that listens at `port` of this machine leaves its key."""
    # The name of the machine, for several may share a home.
    return Path.home() / ".cache" / "distillserve" / f"rollout-{platform.node()}-{port}.key"


def check_own_key_folder(port: int) -> None:
    """Make sure early that `publish_own_key` will find room.

    Raises:
        StartupError: the folder cannot be made or written to, or there is no home for it.
    """
    try:
        folder = own_key_path(port).parent
    except RuntimeError as error:  # a user without an entry in the system's list, and no HOME
        raise StartupError(
            "the rollout server has no key, and nowhere to write one: nobody knows this user's home; set HOME, or "
            "DISTILLSERVE_ROLLOUT_KEY for the server and the trainer"
        ) from error
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StartupError(
            f"the rollout server has no key and cannot write one in {str(folder)!r}: {error.strerror}; {_OTHERWISE}"
        ) from error


def publish_own_key(port: int) -> str:
    """Make a new key and leave it where trainers of this user look; only who has the port may call this.

    Raises:
        StartupError: the file cannot be written.
    """
    check_own_key_folder(port)
    key, path = make_key(), own_key_path(port)
    # Made for its user alone (0600) under a name that nobody can guess, then renamed over what an earlier server left.
    descriptor, beside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{key}\n")
        os.replace(beside, path)
    except OSError as error:
        Path(beside).unlink(missing_ok=True)
        raise StartupError(f"{str(path)!r} cannot be written: {error.strerror}; {_OTHERWISE}") from error
    return key


class OwnKeyAuth(httpx.Auth):
    """For clients without a key: that of the server at the port, where the URL is of this machine and it left one.

    The file is read for every request, so that a server may start, or start again, after its trainer.
    """

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if is_loopback(request.url.host):
            request.headers.update(_own_key_headers(request.url.port or 80))
        yield request


def _own_key_headers(port: int) -> dict[str, str]:
    try:
        return key_headers(own_key_path(port).read_text(errors="replace").strip())
    except (OSError, RuntimeError, InputError):  # RuntimeError: nobody knows this user's home
        return {}
