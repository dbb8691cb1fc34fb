"""The NVIDIA GPUs of this machine as `nvidia-smi` lists them, and which of them a process sees; loads no torch."""

import csv
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from services.config.cuda_devices import are_equal, overlap, parse_devices
from services.errors import ConfigError, StartupError

# What CUDA 13 needs, which torch 2.13 is built with.
NEEDED_DRIVER = "580.65.06"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
_QUERY = ("index", "uuid", "memory.total", "mig.mode.current")
_NVIDIA_SMI_TIMEOUT_S = 30


@dataclass(frozen=True)
class Gpu:
    index: int
    uuid: str
    total_bytes: int


def uses_cuda() -> bool:
    """Whether the installed torch is built for GPUs; the CPU build leaves a machine's GPUs alone."""
    try:
        return "+cpu" not in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False


@cache
def installed_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA can use as a whole; none without a driver, or with the CPU build of torch."""
    if not uses_cuda():
        return ()
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_NVIDIA_SMI_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True) if done.returncode == 0 else ()
    return tuple(_gpus(rows))


def _gpus(rows: Iterable[list[str]]) -> Iterable[Gpu]:
    for row in rows:
        row = [cell.strip() for cell in row]
        # A GPU that is cut into parts has less memory for a process than it says.
        if len(row) == len(_QUERY) and (row[0] + row[2]).isdecimal() and row[3] != "Enabled":
            yield Gpu(int(row[0]), row[1].lower().replace("gpu-", "GPU-"), int(row[2]) << 20)


def devices_seen(option: str, value: str | None) -> tuple[str, ...] | None:
    """The devices of a role whose option `cuda_devices` is `value`: those, else the environment's; None: all of them.

    Raises:
        ConfigError: the list cannot be read.
    """
    name = option if value is not None else VISIBLE_DEVICES
    value = os.environ.get(VISIBLE_DEVICES) if value is None else value
    try:
        return None if value is None else parse_devices(name, value)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def find_gpus(devices: tuple[str, ...] | None) -> tuple[Gpu | str, ...]:
    """What CUDA numbers 0, 1, ... in a process that sees `devices`: a GPU where `nvidia-smi` knows it, else the device."""
    gpus = installed_gpus()
    if devices is None:
        return gpus
    return tuple(next((gpu for gpu in gpus if _is(gpu, device)), device) for device in devices)


def _is(gpu: Gpu, device: str) -> bool:
    return device == str(gpu.index) if device.isdecimal() else bool(are_equal(gpu.uuid, device))


def make_visible(option: str, value: str | None) -> None:
    """Let this process and its children see the devices of an option alone; before torch is loaded.

    Raises:
        ConfigError: of `check_granted`.
    """
    check_granted(option, value)
    if value is not None:
        os.environ[VISIBLE_DEVICES] = ",".join(devices_seen(option, value) or ())
    # Numbers mean what nvidia-smi shows; CUDA's own order puts the fastest first.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def check_granted(option: str, value: str | None) -> None:
    """Refuse devices that CUDA_VISIBLE_DEVICES in the environment does not give this process: a scheduler may have kept
    them for somebody else.

    Raises:
        ConfigError: there are such, or one of the lists cannot be read.
    """
    if value is None:
        return
    wanted, granted = devices_seen(option, value), devices_seen(option, None)
    assert wanted is not None
    for device in wanted if granted is not None else ():
        if overlap(find_ids((device,)), find_ids(granted or ())) is not True:
            raise ConfigError(
                f"{option} = {value!r} is not among the GPUs of {VISIBLE_DEVICES} = {os.environ[VISIBLE_DEVICES]!r} in the "
                "environment; unset one of them, or give the same GPUs in the same way"
            )


def keep_segments_expandable() -> None:
    """Let torch's allocator grow its blocks in place, so that sequences of changing length leave no gaps on a GPU that
    others share; before torch is loaded."""
    if uses_cuda() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def find_ids(devices: tuple[str, ...]) -> tuple[str, ...]:
    """Devices by their UUIDs, where `nvidia-smi` knows them."""
    return tuple(gpu if isinstance(gpu, str) else gpu.uuid for gpu in find_gpus(devices))


def check_driver(can_use_cuda: bool, *, runs_on_cpu: bool = True) -> None:
    """Refuse to run on the CPU in silence where there is a GPU, and torch for it, that does not work.

    Args:
        can_use_cuda: torch.cuda.is_available().
        runs_on_cpu: whether the role can: vLLM's build for GPUs cannot.

    Raises:
        StartupError: with the driver that is needed.
    """
    if can_use_cuda or not uses_cuda():
        return
    way_out = "or install for the CPU with: BACKEND=cpu make setup"
    if not DRIVER_FILE.exists() or devices_seen("", None) == ():
        if not runs_on_cpu:
            raise StartupError(f"vLLM is installed for GPUs, but this process sees none; give it one, {way_out}")
        return
    version = _driver_version()
    if runs_on_cpu:
        way_out = f"or set {VISIBLE_DEVICES}= (empty) to run on the CPU"
    if version and _numbers(version) < _numbers(NEEDED_DRIVER):
        raise StartupError(
            f"the NVIDIA driver {version} is too old for this torch, which needs {NEEDED_DRIVER} or newer; update it, {way_out}"
        )
    raise StartupError(
        f"there is an NVIDIA driver ({version or 'of unknown version'}; {NEEDED_DRIVER} or newer is needed) but torch finds no "
        f"GPU that it can use; look at `nvidia-smi`, give a container its GPUs (--gpus all), {way_out}"
    )


def _driver_version() -> str | None:
    try:
        words = DRIVER_FILE.read_text().split()
    except OSError:
        return None
    return next((word for word in words if word.replace(".", "").isdecimal() and "." in word), None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
