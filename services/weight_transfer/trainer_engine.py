"""The trainer's end of a push: vLLM's nccl engine or ours, built from the same arguments through vLLM's factory."""

import torch
from transformers import PreTrainedModel
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from services.weight_transfer.control import WeightControlClient
from services.weight_transfer.gloo import GlooTrainerInitInfo
from services.weight_transfer.plugin import register
from services.weight_transfer.source import CheckpointSource


def build(
    backend: str,
    control: WeightControlClient,
    model: PreTrainedModel,
    *,
    dtype: torch.dtype,
    address: str,
    port: int,
    world_size: int,
    timeout_s: float,
    bucket_bytes: int,
) -> TrainerWeightTransferEngine:
    """Rendezvous with the workers of all servers; returns an engine whose send_weights() is one full push.

    Args:
        world_size: the trainer's one sender plus all workers.
    """
    register()
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(
            master_address=address,
            master_port=port,
            world_size=world_size,
            packed_buffer_size_bytes=bucket_bytes,
            rank=0,
        )
    else:
        info = GlooTrainerInitInfo(
            master_address=address,
            master_port=port,
            world_size=world_size,
            timeout_s=timeout_s,
            bucket_bytes=bucket_bytes,
            rank=0,
        )
    return WeightTransferTrainerFactory.trainer_init(info, client=control, source=CheckpointSource(model, dtype))
