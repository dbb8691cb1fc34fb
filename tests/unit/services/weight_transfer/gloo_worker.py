"""A worker in a process of its own, to be killed."""

import time
from typing import Any

import torch

from services.weight_transfer.channel import Rendezvous
from services.weight_transfer.gloo import GlooChannel
from services.weight_transfer.rendezvous import join_store


def broadcast_once_and_stop(body: dict[str, Any]) -> None:
    """Take part in one broadcast of 8 bytes, and in none after it."""
    rendezvous = Rendezvous(**body)
    channel = GlooChannel(join_store(rendezvous), rendezvous, 1, torch.device("cpu"))
    channel.broadcast(torch.zeros(8, dtype=torch.uint8))
    time.sleep(60.0)
