"""What services/weight_transfer/nccl.py uses of vLLM and torch, as the table in docs/gpu.md.

`python -m tests.gpu.nccl_interfaces` prints what differs from the table in the installed distribution, CPU or GPU, and where
torch is built for CUDA loads nccl itself, which needs no driver. `... --print` prints the whole table, for the page.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"

USED = [
    ("torch.accelerator", "device_index"),
    ("torch.cuda", "synchronize"),
    ("vllm.distributed.utils", "StatelessProcessGroup"),
    ("vllm.distributed.utils", "StatelessProcessGroup.broadcast_obj"),
    ("vllm.distributed.device_communicators.pynccl", "PyNcclCommunicator"),
    ("vllm.distributed.device_communicators.pynccl", "PyNcclCommunicator.broadcast"),
    ("vllm.distributed.device_communicators.pynccl", "PyNcclCommunicator.destroy"),
    ("vllm.distributed.device_communicators.pynccl_wrapper", "NCCLLibrary"),
    ("vllm.distributed.device_communicators.pynccl_wrapper", "NCCLLibrary.ncclBroadcast"),
    ("vllm.distributed.device_communicators.pynccl_wrapper", "NCCLLibrary.ncclCommAbort"),
    ("vllm.distributed.device_communicators.pynccl_wrapper", "NCCLLibrary.ncclCommInitRank"),
    ("vllm.utils.nccl", "unpinned_nccl_env"),
    ("vllm.utils.torch_utils", "current_stream"),
]

CALLED = ["ncclGetUniqueId", "ncclCommInitRank", "ncclAllReduce", "ncclBroadcast", "ncclCommAbort"]
"""Functions of libnccl.so.2 that a push comes to; vLLM's communicator reduces one number when it is made."""


def table() -> list[str]:
    """A line for each name: its parameters, and the beginning of the SHA-256 of its source text."""
    return [_line(module, name) for module, name in USED]


def documented() -> list[str]:
    """The lines of the page."""
    return [line for line in PAGE.read_text().splitlines() if line.startswith(tuple(f"| `{m}` |" for m, _ in USED))]


def library() -> dict[str, Any]:
    """Version of the nccl that vLLM loads, and whether each function that a push calls is in it."""
    wrapper = import_module("vllm.distributed.device_communicators.pynccl_wrapper")
    nccl = wrapper.NCCLLibrary()
    return {"version": nccl.ncclGetVersion(), **{name: nccl.has_symbol(name) for name in CALLED}}


def _line(module: str, name: str) -> str:
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    digest = hashlib.sha256(inspect.getsource(found).encode()).hexdigest()[:12]
    return f"| `{module}` | `{name}` | `{_parameters(found)}` | {digest} |"


def _parameters(found: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(found)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)


def main() -> int:
    if "--print" in sys.argv:
        print("\n".join(table()))
        return 0
    found, expected = table(), documented()
    differences = [f"- {line}" for line in expected if line not in found]
    differences += [f"+ {line}" for line in found if line not in expected]
    print("\n".join(differences) or f"{len(found)} of {len(found)} as documented (torch {torch.__version__})")
    missing: list[str] = []
    if torch.version.cuda is not None:
        said = library()
        missing = [name for name in CALLED if not said[name]]
        print(f"nccl {said['version']}: {', '.join(CALLED) if not missing else 'without ' + ', '.join(missing)}")
    return 1 if differences or missing else 0


if __name__ == "__main__":
    sys.exit(main())
