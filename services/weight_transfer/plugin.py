"""Entry point of `vllm.general_plugins`: makes the weight receiver known to vLLM, under a name for each backend.

vLLM calls `register` in every one of its processes, more than once. Of our engine only names are registered; its modules are
imported when they are used. On a CPU vLLM gets what it lacks: collectives (services/weight_transfer/cpu_collectives.py), and
leave to use matrix tiles.
"""

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.weight_transfer.gloo import GlooChannel
    from services.weight_transfer.nccl import NcclChannel

BACKENDS = ("gloo", "nccl")
_PREFIX = "distillserve_"
"""vLLM has an engine of its own that is called nccl."""


def engine_name(backend: str) -> str:
    """What vLLM calls the receiver of a backend, in its `--weight-transfer-config`."""
    return _PREFIX + backend


def register() -> None:
    """Register the receiver for every backend; registering twice is harmless."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from services.weight_transfer.cpu_collectives import add_collectives

    add_collectives()
    allow_amx()
    for name in map(engine_name, BACKENDS):
        with suppress(ValueError):  # it is registered already
            WeightTransferEngineFactory.register_engine(name, "services.weight_transfer.receiver", "WeightReceiver")


def allow_amx() -> None:
    """Ask Linux for the matrix tiles of an Intel CPU, which a process may use only when it has asked.

    vLLM 0.32's attention in bfloat16 uses them and does not ask. torch does, on its way to some products; where a small
    model has none of these, the first request killed the worker with SIGILL.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def channel_class(backend: str) -> "type[GlooChannel | NcclChannel]":
    """What carries the bytes of a backend, given by our name or by vLLM's."""
    if backend.removeprefix(_PREFIX) == "nccl":
        from services.weight_transfer.nccl import NcclChannel

        return NcclChannel
    from services.weight_transfer.gloo import GlooChannel

    return GlooChannel
