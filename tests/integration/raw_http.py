"""HTTP/1.1 by hand, for what no client library would send."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tests.integration.processes import KEY, Server

SCORE = "POST /v1/teacher/logprobs HTTP/1.1"
JSON = {"content-type": "application/json"}


def head(first_line: str = SCORE, **headers: object) -> bytes:
    """The first line and the headers, the key included; `_` in a name stands for `-`."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([first_line, "host: teacher", f"authorization: Bearer {KEY}", *lines, "", ""]).encode("latin-1")


@contextmanager
def connection(server: Server, timeout_s: float = 20.0) -> Iterator[socket.socket]:
    with socket.create_connection(server.address, timeout_s) as sock:
        yield sock


def read_answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of the next answer; (0, {}, b"") when the server closed instead."""
    body = b""
    lines = b"HTTP/1.1 100"
    while lines.startswith(b"HTTP/1.1 100"):  # go on sending
        while b"\r\n\r\n" not in body:
            if not (part := _received(sock)):
                return 0, {}, b""
            body += part
        lines, _, body = body.partition(b"\r\n\r\n")
    first, *rest = lines.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    while len(body) < int(headers.get("content-length", 0)) and (part := _received(sock)):
        body += part
    return int(first.split()[1]), headers, body


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 16)
    except ConnectionError:  # closed with something of ours unread
        return b""
