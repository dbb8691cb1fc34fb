"""The servers that `up` starts: where they listen, and the run as each rollout server reads it."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from services.config import ClientSection, RunConfig, ServerSection
from services.errors import ConfigError
from services.gpus.advice import updated
from services.gpus.cards import Gpu, devices_seen, find_gpus
from services.gpus.sharing import may_use_a_gpu, num_parts
from services.launch.role_process import RoleId
from services.process.startup import PortReservation, reserve_port

_LAST_PORT = 65535


@dataclass(frozen=True)
class Server:
    """One server that `up` starts."""

    role: RoleId
    config: RunConfig
    """The run as this server reads it."""
    run_file: Path

    @property
    def url(self) -> str:
        section: ServerSection = getattr(self.config, self.role.role)
        return section.url()

    @property
    def startup_timeout_s(self) -> float:
        client: ClientSection = getattr(self.config, f"{self.role.role}_client")
        return client.startup_timeout_s


def refuse_urls(config: RunConfig) -> None:
    """Refuse a run that `up` would start servers for which it does not use.

    Raises:
        ConfigError: names the option.
    """
    for name, count in (("rollout", config.rollout.num_servers), ("teacher", 1)):
        client: ClientSection = getattr(config, f"{name}_client")
        # A run.json that `up` wrote names its own servers; that is no contradiction.
        if client.urls and not _are_ours(client, getattr(config, name), count):
            raise ConfigError(
                f"{name}_client.urls = {client.urls} names servers that run elsewhere, but `distillserve up` starts its own; "
                f"leave {name}_client.urls out, or attach with `distillserve train`"
            )
    if config.teacher_client.protocol == "vllm":
        raise ConfigError(
            "teacher_client.protocol = vllm is for servers that others start, but `distillserve up` starts its own teacher; "
            "leave it out (teacher.engine = vllm runs that teacher in vLLM), or attach with `distillserve train`"
        )


def _are_ours(client: ClientSection, server: ServerSection, count: int) -> bool:
    """Whether URLs are what `with_free_ports` makes of `count` servers."""
    urls = client.server_urls(server)
    ours = [server.model_copy(update={"port": _port_of(url)}).url() for url in urls]
    return len(urls) == count and urls == ours and urls[0] == server.url()


def with_free_ports(config: RunConfig) -> tuple[RunConfig, list[PortReservation]]:
    """The same run on ports that are free now, with URLs that name them; the ports are ours until they are released."""
    rollout, teacher = config.rollout, config.teacher
    first = reserve_port("rollout", rollout.host, rollout.port)
    of_teacher = reserve_port("teacher", teacher.host, teacher.port)
    following = (port for port in range(first.port + 1, _LAST_PORT + 1) if port != of_teacher.port)
    others = [reserve_port("rollout", rollout.host, next(following, 0)) for _ in range(rollout.num_servers - 1)]
    rollouts = [rollout.model_copy(update={"port": reservation.port}) for reservation in (first, *others)]
    moved = updated(config, "teacher", port=of_teacher.port)
    moved = updated(moved, "teacher_client", urls=[moved.teacher.url()])
    moved = updated(moved, "rollout", port=first.port)
    moved = updated(moved, "rollout_client", urls=[server.url() for server in rollouts])
    return moved, [first, of_teacher, *others]


def rollout_runs(config: RunConfig) -> list[RunConfig]:
    """The run as each rollout server reads it: with its own port and GPUs, and the backend that all of them use.

    Args:
        config: of `with_free_ports`.

    Raises:
        ConfigError: there are too few GPUs.
    """
    rollout = config.rollout
    if rollout.num_servers == 1:
        return [config]
    # Which GPUs it has decides what "auto" stands for, and one server has other GPUs than all of them.
    config = updated(config, "weight_sync", backend=config.weight_sync_backend())
    return [
        # Engines of one seed would draw the same samples.
        updated(config, "rollout", num_servers=1, port=_port_of(url), cuda_devices=devices, seed=rollout.seed + index)
        for index, (url, devices) in enumerate(zip(config.rollout_client.urls, _devices(config), strict=True))
    ]


def _devices(config: RunConfig) -> list[str | None]:
    """cuda_devices of each rollout server: the next ones of those that all of them may use."""
    rollout = config.rollout
    count, each = rollout.num_servers, num_parts(config, "rollout") * rollout.data_parallel_size
    if not may_use_a_gpu(config, "rollout"):
        return [rollout.cuda_devices] * count
    seen = devices_seen("rollout.cuda_devices", rollout.cuda_devices)
    if seen is None:  # all there are; where `nvidia-smi` tells of none, each server finds out itself
        installed = [gpu.index for gpu in find_gpus(None) if isinstance(gpu, Gpu)]
        seen = tuple(map(str, installed or range(count * each)))
    if len(seen) < count * each:
        raise ConfigError(
            f"rollout.num_servers = {count} with {each} GPU{'s' if each > 1 else ''} each needs {count * each} GPUs, but there "
            f"are {len(seen)} (rollout.cuda_devices = {rollout.cuda_devices!r}); name more, or lower it"
        )
    return [",".join(seen[index * each : (index + 1) * each]) for index in range(count)]


def _port_of(url: str) -> int:
    return urlsplit(url).port or 80  # an URL in its one spelling leaves the usual port out
