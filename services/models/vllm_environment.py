"""What vLLM must find in its process before it is imported, shared by both servers; imports no vllm itself."""

import ctypes

import torch

from services.errors import StartupError


def vllm_defaults(dtype: str) -> dict[str, str]:
    """Environment variables that are set where the user has not set them.

    Args:
        dtype: of the weights.
    """
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
    if dtype == "float32":
        # Triton's products of float32 are TF32 by default, which takes attention's logprobs off by 1e-2; torch's are not.
        defaults["TRITON_F32_DEFAULT"] = "ieee"
    return defaults


def float32_head(asked: bool | None, dtype: str, *, is_quantised: bool) -> dict[str, str]:
    """What makes vLLM compute a model's logits in float32, as the trainer does, for its --hf-overrides.

    Args:
        asked: rollout.float32_head or teacher.float32_head; None: on a GPU, where it costs next to nothing. On a CPU vLLM
            widens the whole head at every call.
        dtype: of the weights; nothing is needed for float32.
        is_quantised: whether the head may be, which vLLM computes in its own dtype alone.
    """
    wanted = torch.cuda.is_available() and not is_quantised if asked is None else asked
    return {"head_dtype": "float32"} if wanted and dtype != "float32" else {}


# Whole GiB only, and it wins over what the options say.
KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


_CPU_KV_CACHE_GIB = 1.0


def kv_cache_bytes(gib: float | None) -> int | None:
    """Size of the key-value cache, bytes; None on a GPU where nothing is set: what is left of vLLM's share."""
    if gib is None and torch.cuda.is_available():
        return None
    return int((gib or _CPU_KV_CACHE_GIB) * (1 << 30))


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
