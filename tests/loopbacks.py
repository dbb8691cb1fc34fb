"""Which loopback addresses this machine can listen on."""

import socket


def available_loopbacks() -> list[str]:
    """127.0.0.1, and ::1 where the kernel has IPv6."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return ["127.0.0.1"]
    return ["127.0.0.1", "::1"]
