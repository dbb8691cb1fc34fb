"""A group over nccl, apart from any server."""

from datetime import timedelta

import torch
from torch.distributed import TCPStore

from services.process.startup import free_port
from services.weight_transfer.channel import Rendezvous
from services.weight_transfer.nccl import NcclChannel


def rendezvous(world_size: int, timeout_s: float = 20.0, host: str = "127.0.0.1") -> Rendezvous:
    return Rendezvous(host, free_port(host, 0), 1, world_size, timeout_s)


def join(meeting: Rendezvous, rank: int, device: torch.device) -> NcclChannel:
    """Returns when all ranks have come."""
    timeout = timedelta(seconds=60.0)
    store = TCPStore(meeting.master_address, meeting.master_port, meeting.world_size, rank == 0, timeout)
    return NcclChannel(store, meeting, rank, device)
