"""Keys of the servers: where they come from, what they look like, who cannot do without; loads neither torch nor vllm.

A key is read from DISTILLSERVE_<SERVER>_KEY, or from the file that DISTILLSERVE_<SERVER>_KEY_FILE names. No error shows
one: they name the variable or the file.
"""

import errno
import os
import secrets
from pathlib import Path

from pydantic import SecretStr

from services.config.addresses import is_loopback
from services.errors import ConfigError, InputError

# More than any proxy lets through in a header.
_LONGEST_KEY = 4096


class Secrets:
    """The keys of this process' environment, each read when it is asked for; None is none.

    Raises:
        ConfigError: the variable or the file is no key, or both are given.
    """

    @property
    def rollout_key(self) -> SecretStr | None:
        return _read("DISTILLSERVE_ROLLOUT_KEY")

    @property
    def teacher_key(self) -> SecretStr | None:
        return _read("DISTILLSERVE_TEACHER_KEY")

    def check(self) -> None:
        """Read both, for what must not wait until it needs them."""
        _ = self.rollout_key, self.teacher_key


def make_key() -> str:
    """A new random key, 43 characters."""
    return secrets.token_urlsafe(32)


def reveal(secret: SecretStr | None) -> str | None:
    """A key as text, for what must send or compare it; None when it is not set or empty."""
    return secret.get_secret_value() if secret else None


def key_headers(key: str | None) -> dict[str, str]:
    """The headers that a client of ours sends with `key`, which may have white space around it; None or "": none.

    Raises:
        InputError: it cannot be sent.
    """
    if not key:
        return {}
    if not isinstance(key, str):
        raise InputError(f"key is a {type(key).__name__}; pass the key as a str")
    if (problem := key_problem(key.strip())) is not None:
        raise InputError(f"key {problem}; pass the key of the server")
    return {"Authorization": f"Bearer {key.strip()}"}


def require_key_beyond_loopback(section: str, host: str, key: SecretStr | None) -> None:
    """Refuse to listen where others can connect unless a key guards the server.

    Raises:
        ConfigError: `host` is not a loopback address and no key is set.
    """
    if not reveal(key) and not is_loopback(host):
        variable = f"DISTILLSERVE_{section.upper()}_KEY"
        raise ConfigError(
            f"{section}.host = {host!r} is reachable from other machines but {variable} is not set; "
            f"set the key in the environment, or name its file in {variable}_FILE, or listen on 127.0.0.1"
        )


def _read(variable: str) -> SecretStr | None:
    # An empty variable is how Docker Compose and shells spell one that is not set.
    value, path = os.environ.get(variable, ""), os.environ.get(f"{variable}_FILE", "")
    if value and path:
        raise ConfigError(f"{variable} and {variable}_FILE are both set; unset one of them")
    if path:
        source, key = f"{variable}_FILE = {path!r}", _file_text(variable, path).strip()
    elif value:
        source, key = variable, value.strip()
    else:
        return None
    if (problem := key_problem(key)) is not None:
        raise ConfigError(f"{source} {problem}; a key is one word, for example what `openssl rand -hex 32` prints")
    return SecretStr(key)


def _file_text(variable: str, path: str) -> str:
    try:
        if Path(path).is_fifo():  # it would be waited for, and hold the key for one reader alone
            raise OSError(errno.EINVAL, "it is a pipe")
        with Path(path).open("rb") as file:
            return file.read(_LONGEST_KEY + 64).decode("ascii", errors="replace")
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{variable}_FILE = {path!r} cannot be read: {reason}; name a file that holds the key and that this user may read"
        ) from error


def key_problem(key: str) -> str | None:
    """Why a stripped `key` cannot be sent as a header; it never contains the key."""
    if not key:
        return "is empty"
    if len(key) > _LONGEST_KEY:
        return f"is longer than {_LONGEST_KEY:,} characters"
    for index, character in enumerate(key, start=1):
        if not "!" <= character <= "~":
            what = "white space" if character.isspace() else "no printable ASCII character"
            return f"has {what} at character {index} of {len(key)}"
    return None
