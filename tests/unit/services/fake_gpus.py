"""A machine with GPUs as far as `nvidia-smi` tells: a script of that name, first in PATH."""

import os
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from services.gpus import cards as gpus

UUIDS = (
    "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
    "GPU-0a1b2c3d-0000-1111-2222-333344445555",
    *(f"GPU-{index}e5f6071-0000-1111-2222-333344445555" for index in range(2, 6)),
)


def install_gpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch, total_bytes: Sequence[float], *, mig: str = "[N/A]"
) -> None:
    """Let this process find a GPU for each of `total_bytes`, and a torch that is built for them."""
    rows = [f"{i}, {UUIDS[i]}, {int(total) >> 20}, {mig}" for i, total in enumerate(total_bytes)]
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install_torch("2.13.0", monkeypatch)


def install_torch(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find that torch, and look for GPUs anew."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "torch" else real(name))
    forget_gpus(monkeypatch)


def forget_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process look for GPUs anew, for the time of a test."""
    monkeypatch.setattr(gpus, "installed_gpus", cache(gpus.installed_gpus.__wrapped__))
