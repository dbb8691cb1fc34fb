"""How the student is spread over ranks, and in which precision it computes; the only place that knows.

Master weights, gradients and optimizer state are DTensors: a slice on each rank of a group of `shard` ranks, with `replicate`
such groups. Before a layer runs its weights are gathered in the compute dtype, and dropped after it; gradients are summed over
all ranks in float32. `ddp` is a group of one: each rank has everything, and only gradients travel. A single rank takes the
same way where it computes in another dtype than it keeps, or keeps the student on the host; else the student stays as it is,
and on several ranks with `ddp` torch's DistributedDataParallel adds up gradients, which copies less.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.distributed._composable.replicate import DDP, replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from services.config import RunConfig, TrainerConfig
from services.errors import ConfigError
from trainer.checkpoint.block import Block
from trainer.ranks.group import Ranks
from trainer.student import Student, load_student


def compute_dtype_of(config: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype of the body's products on a device."""
    found: torch.dtype = getattr(torch, config.compute_dtype(on_gpu=device.type == "cuda"))
    return found


def load_and_place(config: RunConfig, ranks: Ranks, *, learns: bool = True) -> Student:
    """The student of a run where it trains; the ranks of a machine load it one after another, for each loads all of it.

    Args:
        learns: whether its parameters get gradients.

    Raises:
        ConfigError: trainer.shard_degree does not divide the number of ranks, or they cannot share weights in four bits.
        StartupError: the model cannot be loaded.
    """
    mesh = _mesh_for(config, ranks)
    checkpointing = config.uses_gradient_checkpointing(on_gpu=ranks.device.type == "cuda")
    set_seed(config.seed)  # what is missing in the files begins alike on all ranks

    def load() -> Student:
        student = load_student(config.student, checkpointing=checkpointing, lora=config.lora)
        return _put(student if learns else student.requires_grad_(False), config, ranks, mesh)

    student = ranks.in_turns(load)
    set_seed(config.seed + ranks.index)  # dropout does not
    return student


def load_student_of(config: RunConfig, ranks: Ranks, checkpoint: Path | None) -> Student:
    """The student of a run that begins, or goes on: its weights, or its adapter beside the weights of student.model, are then
    those of a checkpoint, in the dtype in which they are trained.

    Raises:
        ConfigError, StartupError: as of `load_and_place`.
    """
    if checkpoint is None:
        return load_and_place(config, ranks)
    if config.lora.is_on:
        changed = config.lora.model_copy(update={"adapter": str(checkpoint / "adapter")})
        return load_and_place(config.model_copy(update={"lora": changed}), ranks)
    whole = config.student.model_copy(update={"model": str(checkpoint)})
    student = load_and_place(config.model_copy(update={"student": whole}), ranks)
    student.model.name_or_path = student.model.config.name_or_path = config.student.model or ""
    return student


def load_reference(config: RunConfig, ranks: Ranks) -> Student | None:
    """A frozen copy of the student as the run finds it, placed as the student is; None where the loss does not look at one."""
    if config.loss.alpha_reference_kl == 0:
        return None
    return load_and_place(config, ranks, learns=False).eval()


def place(student: Student, config: RunConfig, ranks: Ranks) -> Student:
    """Put a student where it trains, spread over the ranks.

    Raises:
        ConfigError: trainer.shard_degree does not divide the number of ranks.
    """
    return _put(student, config, ranks, _mesh_for(config, ranks))


def _mesh_for(config: RunConfig, ranks: Ranks) -> DeviceMesh | None:
    """None where a single rank keeps the student whole."""
    if config.lora.load_in_4bit and ranks.count > 1:
        raise ConfigError(
            f"lora.load_in_4bit = true with {ranks.count} ranks: weights of four bits cannot be spread; start one rank, or set "
            "lora.load_in_4bit = false"
        )
    return mesh_of(config.trainer, ranks) if ranks.count > 1 or _is_cast(config, ranks) else None


def _put(student: Student, config: RunConfig, ranks: Ranks, mesh: DeviceMesh | None) -> Student:
    learns = any(parameter.requires_grad for parameter in student.parameters())
    is_whole = config.trainer.parallelism == "ddp" and not _is_cast(config, ranks)
    if mesh is None or (is_whole and not learns):
        student.to(ranks.device)
    elif is_whole and _has_gradients_everywhere(student.to(ranks.device)):
        _add_up_gradients(student)
    else:
        spread(student, mesh, compute_dtype_of(config, ranks.device), cpu_offload=_offloads(config, ranks))
    return student


def _is_cast(config: RunConfig, ranks: Ranks) -> bool:
    """Whether weights are in another dtype, or in another place, while a layer computes with them."""
    return compute_dtype_of(config, ranks.device) != getattr(torch, config.master_dtype()) or _offloads(config, ranks)


def _offloads(config: RunConfig, ranks: Ranks) -> bool:
    """On a CPU everything is in host memory anyway."""
    return config.trainer.cpu_offload and ranks.device.type == "cuda"


def mesh_of(config: TrainerConfig, ranks: Ranks) -> DeviceMesh:
    """The ranks as a mesh of dimensions "replicate" and "shard", the first one left out where there is one group.

    Raises:
        ConfigError: trainer.shard_degree does not divide the number of ranks.
    """
    shard = 1 if config.parallelism == "ddp" else config.shard_degree or ranks.local_count
    if ranks.count % shard:
        raise ConfigError(
            f"trainer.shard_degree = {shard} must divide the number of ranks, {ranks.count}; give a divisor, or leave it out"
        )
    if not dist.is_initialized():  # a single rank is a group as well
        backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(ranks.device.type, (ranks.count // shard, shard), mesh_dim_names=("replicate", "shard"))
    return mesh if ranks.count > shard else mesh["shard"]


def spread(student: Student, mesh: DeviceMesh, compute_dtype: torch.dtype, *, cpu_offload: bool = False) -> None:
    """Shard the student in place, a decoder layer at a time; gradients become sums over all ranks of the mesh.

    Args:
        compute_dtype: in which weights are gathered, and the body computes.
        cpu_offload: keep the shards in host memory.
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    layers = set(getattr(student.model, "_no_split_modules", None) or ())
    for module in [*(m for m in student.modules() if type(m).__name__ in layers), student]:
        # The root too: what stays gathered after a forward pass alone would be in the way of saving and pushing.
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, offload_policy=offload)
        sharded.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by what was counted over all ranks
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _add_up_gradients(student: Student) -> None:
    """Make gradients sums over all ranks, in place: a wrapper module would be another name for every parameter."""
    replicate(student, gradient_as_bucket_view=True)
    assert isinstance(student, DDP)
    student.register_comm_hook(None, _sum_over_ranks)


def _has_gradients_everywhere(student: Student) -> bool:
    """Whether a single token gives every parameter that learns a gradient: not so a tower for images, or experts of which a
    token reaches a few. DistributedDataParallel waits for all of them."""
    device = next(student.parameters()).device
    one, none = torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, 0, dtype=torch.long, device=device)
    student(one.unsqueeze(0), one, one, none, lengths=one + 1).token_logprobs.sum().backward()
    found = all(parameter.grad is not None for parameter in student.parameters() if parameter.requires_grad)
    student.zero_grad(set_to_none=True)
    return found


def _sum_over_ranks(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Not the mean, which is torch's own choice: the loss is divided by what was counted over all ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def is_spread(student: nn.Module) -> bool:
    """Whether its parameters are slices, or on the host, and gathered where they are needed."""
    return isinstance(student, FSDPModule)


def delay_reduction(student: nn.Module, is_last: bool) -> None:
    """Between groups of ranks, add up gradients at the last micro-batch alone; inside of a group they would need memory."""
    if isinstance(student, FSDPModule):
        student.set_requires_all_reduce(is_last)
    elif isinstance(student, DDP):
        student.set_requires_gradient_sync(is_last)


def keeps_gradients(student: nn.Module) -> bool:
    """Whether gradients are parts of buckets that stay, and are set to zero in place: without them there would be both."""
    return isinstance(student, DDP)


def whole(tensor: Tensor) -> Tensor:
    """A parameter or gradient gathered from all ranks, which must all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter or gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def block_of(tensor: Tensor) -> Block:
    """Which part of a parameter, or of what is as large as it, this rank holds."""
    if not isinstance(tensor, DTensor):
        return Block.all_of(tuple(tensor.shape))
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Block(tuple(tensor.shape), tuple(offset), tuple(shape))


def is_first_holder(tensor: Tensor, ranks: Ranks) -> bool:
    """Whether this rank is the first of those that hold the same part."""
    if not isinstance(tensor, DTensor):
        return ranks.index == 0
    places = zip(tensor.placements, tensor.device_mesh.get_coordinate() or (), strict=True)
    return all(place == 0 for placement, place in places if isinstance(placement, Replicate))


def spread_like(held: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a tensor that is spread as a parameter is."""
    if not isinstance(parameter, DTensor):
        return held
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(held, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


@contextmanager
def measuring(student: nn.Module) -> Iterator[None]:
    """Without gradients and dropout, whatever was before afterwards."""
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        student.train(was_training)
