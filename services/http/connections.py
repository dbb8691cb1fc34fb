"""The one place that builds HTTP clients, and what their errors mean.

Our servers are reached directly: the environment's proxies and netrc are for the internet, and in a cluster they lead away
from the neighbour they are asked for. Only its certificates (SSL_CERT_FILE, SSL_CERT_DIR) count, for servers behind TLS.
"""

import asyncio
import math
import os
import socket
import ssl
from collections.abc import Iterable

import httpx

from services.config.keys import key_headers
from services.errors import ConfigError

CONNECT_TIMEOUT_S = 10.0
CLIENT_IDLE_S = 5.0
"""How long a client keeps a connection that nothing is asked over, seconds."""
SERVER_IDLE_S = 30
"""How long a server does: well above the clients, or both ends close while a request is on its way."""
NAME_GRACE_S = 20.0
"""How long a name that does not resolve is asked for: those of containers are known once they start."""

_MOST_CONNECTIONS = 256
_PROBE_S, _FEW_BYTES = 2.0, 32
# What many servers behind TLS say first to a request without it; others just close.
_TLS_ALERT = 0x15
_UNRESOLVED = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


def async_client(
    urls: Iterable[str],
    timeout_s: float,
    key: str | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    auth: httpx.Auth | None = None,
) -> httpx.AsyncClient:
    """A client of the servers at `urls`.

    Args:
        urls: what it will ask; the certificates are read if one of them is https.
        timeout_s: how long to wait for an answer to begin, and between its parts.
        key: bearer token, if the servers ask for one.
        transport: replaces the network in tests.
        auth: what finds the key of each request, where there is none to send with all of them.

    Raises:
        ConfigError: SSL_CERT_FILE or SSL_CERT_DIR names no certificates.
        InputError: the key cannot be sent in a header.
    """
    return httpx.AsyncClient(
        transport=transport,
        headers=key_headers(key),
        auth=auth,
        timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
        limits=httpx.Limits(max_connections=_MOST_CONNECTIONS, keepalive_expiry=CLIENT_IDLE_S),
        trust_env=False,
        verify=_certificates() if any(url.startswith("https:") for url in urls) else True,
    )


def _certificates() -> ssl.SSLContext | bool:
    """Those that the environment names, as OpenSSL's own programs take them; True: those that httpx brings along."""
    file, folder = (os.environ.get(name) or None for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"))
    if file is None and folder is None:
        return True
    if folder is not None and not os.path.isdir(folder):
        raise ConfigError(f"SSL_CERT_DIR = {folder!r} in the environment is no folder; correct it or unset it")
    try:
        return ssl.create_default_context(cafile=file, capath=folder)
    except OSError as error:  # ssl.SSLError is one
        reason = "it holds no certificates in PEM form" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(
            f"SSL_CERT_FILE = {file!r} in the environment cannot be used: {reason}; correct it or unset it"
        ) from error


# ---- what became of a request


def is_final(error: httpx.RequestError) -> bool:
    """Whether the same request fails whenever it is asked: no TLS or no HTTP is spoken there, or the certificate is wrong."""
    cause = _first_cause(error)
    if isinstance(cause, ssl.SSLError):
        return not isinstance(
            cause, ssl.SSLEOFError | ssl.SSLZeroReturnError
        )  # closed: a proxy whose server is to come
    if isinstance(error, httpx.ProtocolError):
        return (
            str(error).lower().startswith("illegal")
        )  # h11's word for bytes that are no HTTP; others are of an early end
    return not isinstance(error, httpx.TimeoutException | httpx.NetworkError)


def request_of(error: httpx.RequestError) -> httpx.Request | None:
    """What was asked; None where the error came from outside a client, as in tests."""
    try:
        return error.request
    except RuntimeError:  # httpx's word for none
        return None


def is_unresolved(error: Exception) -> bool:
    """Whether there is no such name, as far as the resolver knows now."""
    cause = _first_cause(error)
    return isinstance(cause, socket.gaierror) and cause.errno in _UNRESOLVED


def retry_after_s(response: httpx.Response) -> float | None:
    """When an answer says that asking again makes sense, seconds; None where it does not."""
    try:
        seconds = float(response.headers.get("Retry-After", "nan"))
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


async def what_is_spoken(url: str) -> str | None:
    """What it is that a server speaks instead of plain HTTP; None where it cannot be told.

    For a connection that ended without an answer, which httpx reports alike for a server of another protocol, one behind
    TLS, and a proxy whose own server is still starting.
    """
    parts = httpx.URL(url)
    port = parts.port or 80
    said = await _first_bytes(
        parts.host, port, b"GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % parts.netloc
    )
    if said is None or said.startswith(b"HTTP/"):
        return None
    if said and said[0] != _TLS_ALERT:
        return f"no HTTP (it says {said!r})"
    return "TLS: give it with https://" if said or await _shakes_hands(parts.host, port) else None


async def _first_bytes(host: str, port: int, request: bytes) -> bytes | None:
    """What comes first; None when nobody could be asked."""
    try:
        async with asyncio.timeout(_PROBE_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request)
                return await reader.read(_FEW_BYTES)
            except ConnectionResetError:
                return b""
            finally:
                writer.close()
    except OSError:  # TimeoutError is one
        return None


async def _shakes_hands(host: str, port: int) -> bool:
    """Whether TLS begins there, with whatever certificate; nothing is sent over it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(_PROBE_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            writer.close()
            return True
    except OSError:
        return False


def describe(error: httpx.RequestError, timeout_option: str) -> str:
    """What became of a request, as what follows its URL: "cannot be reached: ...", "is slow: ...".

    Args:
        timeout_option: what to raise when the server is alive but slow.
    """
    request = request_of(error)
    waits = {} if request is None else request.extensions.get("timeout", {})
    kind = type(error).__name__

    def seconds(phase: str) -> str:
        return f"{waits[phase]:g} s" if waits.get(phase) is not None else "its time"

    if isinstance(error, httpx.ReadTimeout):
        return f"is connected but slow: no answer within {seconds('read')} ({kind}); raise {timeout_option}"
    if isinstance(error, httpx.WriteTimeout):
        return (
            f"is connected but takes nothing of the request within {seconds('write')} ({kind}); raise {timeout_option}"
        )
    if isinstance(error, httpx.PoolTimeout):
        return (
            f"is not asked: all {_MOST_CONNECTIONS} connections of this client are in use for {seconds('pool')} ({kind}); "
            f"ask for less at once, or raise {timeout_option}"
        )
    if isinstance(error, httpx.ConnectTimeout):
        fix = "look at host, port and the firewalls between"
        return f"cannot be reached: no connection within {seconds('connect')} ({kind}); {fix}"
    return f"cannot be reached: {_describe_cause(error)}"


def _describe_cause(error: httpx.RequestError) -> str:
    cause = _first_cause(error)
    if is_unresolved(error):
        return f"no such host name ({cause}); correct it, or let this machine know the name"
    if isinstance(cause, ssl.SSLCertVerificationError):
        fix = "name the file of its authority in SSL_CERT_FILE"
        return f"its certificate is not trusted ({cause.verify_message}); {fix}"
    if isinstance(cause, ssl.SSLError) and is_final(error):
        return f"no TLS that we understand is spoken there ({cause.reason or cause}); is it http:// ?"
    if isinstance(error, httpx.ProtocolError) and is_final(error):
        return f"no HTTP is spoken there ({error}); is it https://, or another program's port?"
    if isinstance(cause, ConnectionRefusedError):
        return "nothing listens there (connection refused)"
    said = f"{type(error).__name__} {error}".strip()
    return said if cause is error or str(cause) in said else f"{said} ({cause})"


def _first_cause(error: BaseException) -> BaseException:
    """The operating system's word, or TLS's, under those of httpx, httpcore and anyio; the error itself without one."""
    found: BaseException = error
    below: BaseException | None = error if isinstance(error, httpx.NetworkError) else None
    while below is not None:
        if isinstance(below, OSError) and not isinstance(below, TimeoutError):
            found = below
        if isinstance(below, BaseExceptionGroup):  # of the addresses of a name, each of which failed
            below = below.exceptions[0]
        else:  # httpcore does not always say what it raises its own from; under an OSError is what a caller was busy with
            below = below.__cause__ or (None if isinstance(below, OSError) else below.__context__)
    return found
