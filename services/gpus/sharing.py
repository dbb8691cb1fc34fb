"""Which roles of a run use which GPU of this machine, as far as the run says; loads no torch.

A role uses the first of the GPUs that it sees (`cuda_devices`, else CUDA_VISIBLE_DEVICES, else all): the trainer one for each
rank of this machine, a vLLM server as many as tensor_parallel_size times data_parallel_size, several of them one after another.
Roles whose servers the trainer reaches through loopback are on one machine;
so are those whose cuda_devices are all set, which is how containers on one card say it.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from urllib.parse import urlsplit

from services.config import ClientSection, RunConfig
from services.config.addresses import checked_url, is_loopback
from services.config.cuda_devices import overlap, parse_devices
from services.errors import ConfigError
from services.gpus.cards import DRIVER_FILE, Gpu, devices_seen, find_gpus, uses_cuda

ROLES = ("rollout", "teacher", "trainer")
SECTIONS = {"rollout": "rollout", "teacher": "teacher", "trainer": "student"}
"""Section of a role's cuda_devices."""


def servers_share_a_gpu(config: RunConfig) -> bool:
    """Whether the servers that `up` starts may use one GPU, and must start one after another: vLLM measures free memory."""
    ours, theirs = (gpus_of(config, role, strict=False) for role in ("rollout", "teacher"))
    if ours and theirs:
        return bool(set(ours) & set(theirs))
    if not all(may_use_a_gpu(config, role) for role in ("rollout", "teacher")):
        return False
    lists = [config.rollout.cuda_devices, config.teacher.cuda_devices]
    return None in lists or overlap(*(parse_devices("cuda_devices", value or "") for value in lists)) is not False


def may_use_a_gpu(config: RunConfig, role: str) -> bool:
    """Whether a role that finds a GPU uses it, and there may be one, also where `nvidia-smi` does not tell."""
    option = f"{SECTIONS[role]}.cuda_devices"
    if not uses_cuda() or not _places(config, role):
        return False
    sees_none = devices_seen(option, getattr(config, SECTIONS[role]).cuda_devices) == ()
    return not sees_none and (DRIVER_FILE.exists() or bool(find_gpus(None)))


def check_nccl(config: RunConfig, role: str | None = None) -> None:
    """Refuse nccl where the trainer's card is one of the rollout server's, which nccl cannot connect.

    Args:
        role: that is about to start; None: all of them, on this machine.

    Raises:
        ConfigError: with the fix.
    """
    sections = (config.student, config.rollout)
    if role == "teacher":
        return  # no weights are pushed to it
    if config.weight_sync_backend() != "nccl" or (role and any(s.cuda_devices is None for s in sections)):
        return
    ours, theirs = (gpus_of(config, name, strict=False) for name in ("trainer", "rollout"))
    fix = "give student.cuda_devices and rollout.cuda_devices different GPUs, or leave weight_sync.backend out (gloo)"
    if set(ours) & set(theirs):
        raise ConfigError(f"weight_sync.backend = nccl, but the trainer and the rollout server share a GPU; {fix}")
    if role is None and not (ours and theirs):
        raise ConfigError(
            f"weight_sync.backend = nccl needs a GPU for the trainer and one for the rollout server; {fix}"
        )


def neighbours(config: RunConfig, role: str | None) -> list[str]:
    """The roles that may use the GPUs of `role`: it, and those that the run has on the same machine."""
    has = {
        "rollout": config.student.model is not None,
        "teacher": config.teacher.model is not None and config.teacher_client.protocol == "distillserve",
        "trainer": config.student.model is not None and config.data.path is not None,
    }
    if role is None:
        return [name for name in ROLES if has[name]]
    return [name for name in ROLES if name == role or (has[name] and _are_together(config, role, name))]


def _are_together(config: RunConfig, a: str, b: str) -> bool:
    """Whether two roles are on one machine, as far as the run says: URLs of loopback, or the same cuda_devices, which
    containers on one card are given."""
    explicit = all(getattr(config, SECTIONS[role]).cuda_devices is not None for role in (a, b))
    return explicit or all(role == "trainer" or _is_local(getattr(config, f"{role}_client")) for role in (a, b))


def _is_local(client: ClientSection) -> bool:
    """Whether the trainer reaches a server through loopback; what is no URL, it will refuse itself."""
    try:
        hosts = [urlsplit(checked_url(url, base_path=True)).hostname or "" for url in client.urls]
    except ValueError:
        return False
    return all(is_loopback(host) for host in hosts)


def gpus_of(config: RunConfig, role: str, *, strict: bool) -> list[Gpu]:
    """The GPUs that a role uses of those that it sees.

    Raises:
        ConfigError: in strict mode, one is not there.
    """
    if not uses_cuda():
        return []  # whatever the environment says of devices, of which a scheduler may have its own words
    section = getattr(config, SECTIONS[role])
    option = f"{SECTIONS[role]}.cuda_devices"
    seen = find_gpus(devices_seen(option, section.cuda_devices))
    missing = [gpu for gpu in seen if isinstance(gpu, str) and not gpu.startswith("MIG-")]
    installed = [gpu for gpu in find_gpus(None) if isinstance(gpu, Gpu)]
    if strict and section.cuda_devices is not None and missing and installed:
        there = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in installed)
        raise ConfigError(f"{option} = {section.cuda_devices!r}: there is no GPU {missing[0]} here; there are {there}")
    places = _places(config, role)
    if strict and installed and seen and max(places, default=0) >= len(seen):
        given = f"the {role} sees" if section.cuda_devices is None else f"{option} = {section.cuda_devices!r} names"
        raise ConfigError(
            f"{_asked(config, role)} needs {max(places) + 1} GPUs, {given} {len(seen)}; give it more with {option}, or ask for less"
        )
    return [gpu for place in places if place < len(seen) and isinstance(gpu := seen[place], Gpu)]


def _asked(config: RunConfig, role: str) -> str:
    """The options that say how many GPUs a role needs."""
    if role == "trainer":
        (_, here), asked = count_ranks(config), config.trainer.num_processes
        return f"trainer.num_processes = {asked}" if here == asked else f"LOCAL_WORLD_SIZE = {here} in the environment"
    section = SECTIONS[role]
    if role == "teacher" and config.teacher.engine == "transformers":
        return f"{section}.device = {config.teacher.device}"
    names = ("num_servers", "tensor_parallel_size", "data_parallel_size")
    above_one = [name for name in names if getattr(getattr(config, section), name, 1) > 1]
    return f"{section}.{' times '.join(above_one or ['engine_args'])}"


def count_ranks(config: RunConfig, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Ranks of the trainer, and those of this machine: what torchrun says in the environment of one, else those that `up`
    starts."""
    in_all, here = (environment.get(name, "") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if in_all.isdecimal() and here.isdecimal():
        return int(in_all), int(here)
    return config.trainer.num_processes, config.trainer.num_processes


def num_parts(config: RunConfig, role: str) -> int:
    """GPUs that vLLM spreads one model of a server over."""
    size: int = getattr(config, SECTIONS[role]).tensor_parallel_size
    return size * _engine_size(config, role, "pipeline_parallel_size", "-pp")


def _engine_size(config: RunConfig, role: str, name: str, short: str) -> int:
    """A number of GPUs in `engine_args`, which for the rollout server are the words of a command line; 1 where there is none."""
    value: object = 1
    if role == "teacher":
        value = config.teacher.engine_args.get(name, 1)
    else:
        words = [part for word in config.rollout.engine_args for part in word.split("=", 1)]
        for flag, following in pairwise(words):
            if flag == short or flag.replace("_", "-") == f"--{name.replace('_', '-')}":
                value = following
    # What is no such number, vLLM refuses.
    return max(1, int(str(value))) if str(value).isdecimal() else 1


def _places(config: RunConfig, role: str) -> Sequence[int]:
    """Which of the GPUs that it sees a role uses."""
    if role == "rollout" or (role == "teacher" and config.teacher.engine == "vllm"):
        copies = config.rollout.data_parallel_size * config.rollout.num_servers
        if role == "teacher":
            copies = _engine_size(config, role, "data_parallel_size", "-dp")
        return range(num_parts(config, role) * copies)
    if role == "teacher" and config.teacher.device not in ("auto", "cuda"):
        kind, _, number = config.teacher.device.partition(":")
        return [int(number)] if kind == "cuda" and number.isdecimal() else []
    return range(count_ranks(config)[1]) if role == "trainer" else [0]
