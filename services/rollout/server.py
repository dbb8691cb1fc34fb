"""`distillserve rollout`: become vLLM's stock OpenAI server, with our plugin, our guard and our route.

This process checks what can be checked cheaply and then replaces itself, so that signals, exit codes and
memory are vLLM's own and no wrapper stays behind.
"""

import ctypes
import json
import os
import sys

import torch

from services.config import RolloutConfig, RunConfig, Secrets, require_key_beyond_loopback
from services.errors import StartupError
from services.rollout.settings import RolloutSettings
from services.startup import check_model_folder, check_port

# `python -m`, not the `vllm` console script: that of the CPU distribution crashes on its own version look-up.
_MODULE = "vllm.entrypoints.openai.api_server"
_GUARD = "services.rollout.guard.RolloutGuard"


def run(config: RunConfig) -> None:
    """Replace this process by the rollout server; does not return.

    Raises:
        ConfigError: no student, or a public address without a key.
        StartupError: the port is taken or the model folder is missing.
    """
    config.require("rollout")
    require_key_beyond_loopback("rollout", config.rollout.host, Secrets().rollout_key)
    check_port("rollout", config.rollout.host, config.rollout.port)
    check_model_folder("student.model", config.student.model or "")
    check_libnuma()
    command = vllm_command(config)
    sys.stdout.flush()
    os.execve(command[0], command, vllm_environment(config))


def vllm_command(config: RunConfig) -> list[str]:
    """The argument vector of vLLM's server."""
    rollout, student = config.rollout, config.student
    options: dict[str, object] = {
        "--model": student.model,
        "--host": rollout.host,
        "--port": rollout.port,
        "--dtype": rollout.dtype,
        "--seed": rollout.seed,
        "--max-num-seqs": rollout.max_num_seqs,
        "--max-logprobs": rollout.max_logprobs,
        "--tensor-parallel-size": rollout.tensor_parallel_size,
        # The policy that sampled is the one after temperature, top-p and top-k.
        "--logprobs-mode": "processed_logprobs",
        "--weight-transfer-config": json.dumps({"backend": config.weight_sync_backend()}),
        "--middleware": _GUARD,
        "--uvicorn-log-level": "warning",
    }
    if rollout.max_model_len is not None:
        options["--max-model-len"] = rollout.max_model_len
    if torch.cuda.is_available():
        options["--gpu-memory-utilization"] = rollout.gpu_memory_utilization
    flags = ["--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    if not torch.cuda.is_available():
        flags.append("--enforce-eager")  # compiling for CPU costs minutes and gains nothing on short completions
    if student.trust_remote_code:
        flags.append("--trust-remote-code")
    pairs = [text for key, value in options.items() for text in (key, str(value))]
    return [sys.executable, "-m", _MODULE, *pairs, *flags, *rollout.engine_args]


def vllm_environment(config: RunConfig) -> dict[str, str]:
    """The environment of vLLM's server: ours, plus what its command line cannot say."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Threads that spin after each parallel region starve the two other roles on a small machine.
        "KMP_BLOCKTIME": "0",
    }
    if not torch.cuda.is_available():
        # vLLM's sampler goes through torch.compile even with --enforce-eager, which needs a C++ compiler: without
        # one the engine dies at its first completion.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
    fixed = {
        "VLLM_SERVER_DEV_MODE": "1",  # the weight routes exist only then; the guard keeps the others shut
        "VLLM_CPU_KVCACHE_SPACE": _kv_cache_gib(config.rollout),
        **RolloutSettings.from_config(config).to_environment(),
    }
    return {**defaults, **os.environ, **fixed}


def check_libnuma() -> None:
    """vLLM for CPU loads this system library, which its wheel does not bring along.

    Raises:
        StartupError: there is no GPU and the library is missing.
    """
    if torch.cuda.is_available():
        return
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        raise StartupError(
            "vLLM for CPU needs the system library libnuma.so.1, which is not installed; install it, "
            "on Debian and Ubuntu with: apt install libnuma1"
        ) from error


def _kv_cache_gib(rollout: RolloutConfig) -> str:
    return f"{rollout.kv_cache_gib:g}"
