"""How the student is spread over processes, and in which precision it computes; the only place that knows."""

from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from services.config import RunConfig
from trainer.student import Student


def compute_dtype_of(config: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype of the body's products on a device."""
    found: torch.dtype = getattr(torch, config.compute_dtype(on_gpu=device.type == "cuda"))
    return found


def spread(student: Student, mesh: DeviceMesh, how: Literal["fsdp2", "ddp"]) -> nn.Module:
    """What to call in place of the student, with gradients that are means over all ranks of the mesh.

    Args:
        how: fsdp2 shards parameters, gradients and optimizer state, a decoder layer at a time, and ends what it does with a
            layer when the layer has run; ddp keeps all of it on every rank.
    """
    if how == "ddp":
        return DistributedDataParallel(student, process_group=mesh.get_group())
    layers = set(getattr(student.model, "_no_split_modules", None) or ())
    for module in list(student.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(student, mesh=mesh)
    return student
