"""`[rollout]`: the vLLM server that samples completions from the student."""

from pydantic import Field

from services.config.section import Port
from services.config.server import ServerSection


class RolloutConfig(ServerSection):
    """The vLLM server that samples completions from the student."""

    port: Port = 8100
    """TCP port to listen on; `up` takes a free one when it is in use."""
    num_servers: int = Field(1, ge=1)
    """Servers that `up` starts, each with GPUs of its own, which share the completions of a step."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest prompt plus completion, tokens; default: what data.max_prompt_tokens leaves room for, else 4096 or twice the
    longest completion (less on a GPU without that much room), at most what the model's config says."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Key-value cache, GiB; default: 1 on a CPU, computed on a GPU that roles share, else what is left of the GPU."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of the GPU's memory vLLM may use; default: computed where roles share the GPU (docs/gpu.md), else 0.9."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs one engine of a server spreads the student over."""
    data_parallel_size: int = Field(1, ge=1)
    """Engines of one server, each with a student and GPUs of its own: for mixtures of experts, which spread their experts over
    them. For other students rather start several servers and name them in rollout_client.urls: one can fail without the others."""
    max_num_seqs: int | None = Field(None, ge=1)
    """Completions in flight at once; default: 256, less on a GPU without room for so many."""
    float32_head: bool | None = None
    """Compute the logits of a half-precision student in float32, as the trainer does; default: on a GPU. On a CPU each
    call then widens the whole head."""
    max_logprobs: int = Field(64, ge=1)
    """Largest student top-k a request may ask for."""
    max_body_mib: int = Field(64, ge=1)
    """Largest request body, MiB."""
    max_completions_per_request: int = Field(8192, ge=1)
    """Largest prompts times samples of one request."""
    max_pending_requests: int = Field(64, ge=1)
    """Requests that are worked on or wait; one more is answered 429 with Retry-After."""
    transfer_timeout_s: float = Field(120.0, gt=0)
    """How long a caller may take to send its body, and to take each part of its answer, seconds; then its completions are
    aborted and its place is free again."""
    seed: int = 0
    """Seed of the server's sampler."""
    engine_args: list[str] = []
    """Further arguments of vLLM's server, passed on as they are, e.g. ["--enable-prefix-caching"]."""
