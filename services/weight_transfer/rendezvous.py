"""Where the trainer and the workers meet: on the addresses that the run names, not on all that a machine has."""

import errno
import socket

from services.startup import socket_address


def listen_on(address: str, port: int) -> socket.socket:
    """A listening socket on an address (0: any free port); on all of its family when it is not this machine's own, as that
    behind which a translated network keeps it.

    Raises:
        OSError: there is no such name, or the port cannot be had.
    """
    family, ours = socket_address(address, port)
    try:
        return socket.create_server(ours, family=family)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
    return socket.create_server(("::" if family == socket.AF_INET6 else "0.0.0.0", port), family=family)


def own_address(peer: str, port: int) -> str:
    """This machine's address on the way to a peer, of the peer's family; nothing is sent.

    Raises:
        OSError: there is no way.
    """
    family, theirs = socket_address(peer, port)
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect(theirs)
        return socket.getnameinfo(way.getsockname(), socket.NI_NUMERICHOST)[0]
