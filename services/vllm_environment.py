"""What vLLM must find in its process before it is imported, shared by both servers; imports no vllm itself."""

import ctypes

import torch

from services.errors import StartupError


def vllm_defaults() -> dict[str, str]:
    """Environment variables that are set where the user has not set them."""
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
    return defaults


# Whole GiB only, and it wins over what the options say.
KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def kv_cache_bytes(gib: float) -> int | None:
    """Size of the key-value cache on CPU, bytes; None on a GPU, where the share of its memory decides."""
    return None if torch.cuda.is_available() else int(gib * (1 << 30))


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
