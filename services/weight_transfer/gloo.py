"""A channel through host memory; works for models on CPU and CUDA."""

import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store

from services.weight_transfer.channel import GroupLostError, Rendezvous
from services.weight_transfer.rendezvous import own_address

_POLL_S, _KEEP_POLL_S = 0.001, 0.1
_LATER_S = 1.0
"""Gloo's own deadline comes after ours, which says what it is."""
_LEFT = "the group of this push has been left"


class GlooChannel:
    """A gloo group of its own, apart from torch's default one.

    Args:
        device: of the model; not used, the buffers are in host memory.
    """

    def __init__(self, store: Store, rendezvous: Rendezvous, rank: int, device: torch.device) -> None:
        self.device = torch.device("cpu")
        self._timeout_s = rendezvous.timeout_s
        self._group: ProcessGroupGloo | None = _group(store, rendezvous, rank)
        self._left = threading.Event()

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Send from rank 0, or receive into, a contiguous uint8 CPU tensor.

        After an error gloo may still write into the buffer, until its own deadline: use another one.

        Raises:
            TimeoutError: it took longer than the rendezvous' `timeout_s`.
            GroupLostError: a peer is lost, or the channel was aborted.
        """
        group = self._group
        if group is None:
            raise GroupLostError(_LEFT)
        deadline = time.monotonic() + self._timeout_s
        work = group.broadcast(buffer, 0)  # type: ignore[attr-defined]  # missing in torch's stubs
        while not work.is_completed():  # work.wait() does not notice that the group is left
            left = self._left.wait(_POLL_S)
            if left or time.monotonic() > deadline:
                threading.Thread(target=_keep, args=(group, work), name="gloo-end", daemon=True).start()
                del group, work  # the error would keep them, and with them the connections to the peers
                raise (
                    GroupLostError(_LEFT)
                    if left
                    else TimeoutError(f"a broadcast took longer than {self._timeout_s:g} s")
                )
        try:
            work.wait()
        except RuntimeError as error:  # what gloo says is the place in its source
            del group, work
            raise GroupLostError(
                "the connection to a peer of this push was lost: it ended, or left the group"
            ) from error

    def abort(self) -> None:
        """Leave the group; a broadcast that runs in another thread ends with a GroupLostError. Safe to call twice.

        The peers notice it in the next broadcast: gloo brings one to its end that has begun, or to its deadline.
        """
        group, self._group = self._group, None
        self._left.set()
        if group is not None:
            group.abort()


def _keep(group: ProcessGroupGloo, work: Any) -> None:
    """Hold a group until its broadcast has ended: its destructor would wait for that, and hold up every Python thread."""
    while not work.is_completed():
        time.sleep(_KEEP_POLL_S)


def _group(store: Store, rendezvous: Rendezvous, rank: int) -> ProcessGroupGloo:
    timeout = timedelta(seconds=rendezvous.timeout_s + _LATER_S)
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return ProcessGroupGloo(store, rank, rendezvous.world_size, timeout)
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stubs
    options._timeout = timeout
    # Torch's own choice is the address of the machine's name, which many networks do not know, or know as 127.0.1.1.
    address = own_address(rendezvous.master_address, rendezvous.master_port)
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    return ProcessGroupGloo(store, rank, rendezvous.world_size, options)
