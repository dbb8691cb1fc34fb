"""What is found out and laid ready before the first process of a run starts: models, GPUs, folder, ports, run files."""

from contextlib import ExitStack

from services.config import RunConfig, check_output_dir
from services.gpus.plan import plan
from services.gpus.sharing import check_nccl
from services.launch.role_log import forget_logs
from services.launch.role_process import RoleId
from services.launch.run_folder import RunFolder, run_folder, written
from services.launch.servers import Server, refuse_urls, rollout_runs, with_free_ports
from services.process.startup import check_model_folder, check_output_room, check_socket_folder
from services.process.streams import say


def check_start(config: RunConfig) -> None:
    """What is found out before a run's folder is touched.

    Raises:
        ConfigError, StartupError: as of `up`.
    """
    refuse_urls(config)
    check_model_folder("student.model", config.student.model or "")
    check_model_folder("teacher.model", config.teacher.model or "")
    check_socket_folder()
    _share_gpus(config)


def prepare(config: RunConfig, stack: ExitStack) -> tuple[RunConfig, RunFolder, list[Server]]:
    """The run on ports that are free, its folder, and the servers to start; the stack gives all of it back.

    Raises:
        ConfigError, StartupError: as of `up`.
    """
    output_dir = check_output_dir(config)
    check_output_room(output_dir)
    if config.output.overwrite:
        forget_logs(output_dir / "logs")
    moved, reservations = with_free_ports(config)
    for reservation in reservations:
        stack.callback(reservation.release)
    folder = stack.enter_context(run_folder(output_dir, moved))
    return moved, folder, _servers(moved, folder, stack)


def wanted_ports(config: RunConfig) -> dict[str, int]:
    """The port of each kind of server that a run names."""
    return {name: getattr(config, name).port for name in ("rollout", "teacher")}


def _share_gpus(config: RunConfig) -> None:
    """Show what each role is computed to take of its GPU; after what is checked in no time, for a hub may be asked.

    Raises:
        ConfigError: of `check_nccl` and of `plan`.
    """
    check_nccl(config)
    found = plan(config)
    for line in found.lines() if found is not None else ():
        say(line)


def _servers(config: RunConfig, folder: RunFolder, stack: ExitStack) -> list[Server]:
    """The servers to start; of several rollout servers each reads a run file of its own, which goes with the stack."""
    servers, runs = [], rollout_runs(config)
    for index, run in enumerate(runs):
        role, path = RoleId("rollout", index, len(runs)), folder.run_file
        if len(runs) > 1:
            path = stack.enter_context(written(path.with_suffix(f".rollout-{index + 1}.json"), run))
        servers.append(Server(role, run, path))
    return [*servers, Server(RoleId("teacher"), config, folder.run_file)]
