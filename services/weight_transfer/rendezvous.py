"""Where the trainer and the workers meet: on the address that the run names, not on all that a machine has."""

import socket
import time
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from services.errors import WeightSyncError
from services.process.startup import socket_address
from services.weight_transfer.channel import Rendezvous

_ARRIVED = "distillserve/arrived"
"""In the store, how many workers have come to a rendezvous."""
_POLL_S = 0.01


def listen_on(address: str, port: int) -> socket.socket:
    """A listening socket on an address of this machine, and on none of its others; port 0: any free one.

    Raises:
        WeightSyncError: the address is not this machine's, or another program has the port.
    """
    try:
        family, ours = socket_address(address, port)
        return socket.create_server(ours, family=family)
    except OSError as error:
        fix = (
            f"weight_sync.master_port = {port}: another program may have it; give another one, or leave it out"
            if port
            else "give an address of this machine at which the rollout servers reach it"
        )
        reason = str(error.strerror).partition(" (")[0]  # create_server adds the address
        raise WeightSyncError(
            f"weight_sync.master_address = {address} cannot be listened on ({reason}); {fix}"
        ) from error


def own_address(peer: str, port: int) -> str:
    """This machine's address on the way to a peer, of the peer's family; nothing is sent.

    Raises:
        OSError: there is no way.
    """
    family, theirs = socket_address(peer, port)
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect(theirs)
        return socket.getnameinfo(way.getsockname(), socket.NI_NUMERICHOST)[0]


def host_store(address: str, port: int, timeout_s: float) -> TCPStore:
    """The store at which the workers arrive, at every push; its `port` is the one that was chosen.

    Raises:
        WeightSyncError: the address is not this machine's, or another program has the port.
    """
    listener = listen_on(address, port)
    return TCPStore(
        address,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def await_workers(store: TCPStore, rendezvous: Rendezvous, told: "Future[Any]") -> Store:
    """The part of the store that belongs to this rendezvous, when every worker has come to it.

    Args:
        told: what tells the workers to come; once it has failed they are not waited for.

    Raises:
        TimeoutError: not everybody has come in time.
        Exception: with which `told` failed.
    """
    part = PrefixStore(str(rendezvous.attempt), store)
    num_workers = rendezvous.world_size - 1
    deadline = time.monotonic() + rendezvous.timeout_s
    while (arrived := part.add(_ARRIVED, 0)) < num_workers:
        if told.done():
            told.result()
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{arrived} of {num_workers} workers of the rollout servers came to {store.host}:{store.port} within "
                f"{rendezvous.timeout_s:g} s; they must reach weight_sync.master_address there (name, firewall), or raise "
                "weight_sync.stage_timeout_s"
            )
        time.sleep(_POLL_S)
    return part


def join_store(rendezvous: Rendezvous) -> Store:
    """A worker's end of `await_workers`.

    Raises:
        RuntimeError: the trainer cannot be reached within the deadline.
    """
    store = TCPStore(
        rendezvous.master_address,
        rendezvous.master_port,
        is_master=False,
        timeout=timedelta(seconds=rendezvous.timeout_s),
        wait_for_workers=False,
    )
    part = PrefixStore(str(rendezvous.attempt), store)
    part.add(_ARRIVED, 1)
    return part
