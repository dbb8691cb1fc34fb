"""What every process of vLLM gets from our entry point."""

import subprocess
import sys

import pytest
import torch

# Linux, x86: which states of the CPU this process may use, and the bit of the matrix tiles' data.
ASK = """
import ctypes
from services.weight_transfer.plugin import register
register()
register()
allowed = ctypes.c_uint64()
assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(allowed)) == 0
print(bool(allowed.value >> 18 & 1))
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="a CPU without matrix tiles has nothing to allow")
def test_matrix_tiles_may_be_used_where_there_are_any() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr


def test_a_cpu_without_tiles_is_not_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.weight_transfer import plugin

    asked: list[str] = []
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append("asked"))
    for is_there in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda is_there=is_there: is_there)
        plugin.allow_amx()
        assert asked == ["asked"] * is_there
