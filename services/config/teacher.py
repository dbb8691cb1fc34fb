"""`[teacher]`: the server that scores completions."""

from typing import Any, Literal

from pydantic import Field

from services.config.section import Port
from services.config.server import ServerSection


class TeacherConfig(ServerSection):
    """The server that scores completions with the teacher."""

    port: Port = 8101
    """TCP port to listen on; `up` takes a free one when it is in use."""
    model: str | None = None
    """Folder or hub id of a causal LM, or "base" for the model of student.model as it is before it is trained; required by the
    teacher server."""
    teacher_model_init_kwargs: dict[str, Any] = {}
    """Further keyword arguments of transformers' from_pretrained, as JSON."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings along; off unless you have read that code."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the forward pass: transformers, or vLLM for its parallelism and quantisation, at temperature 1 only."""
    device: str = "auto"
    """Torch device: "auto" (cuda when there is one), "cpu", "cuda:1"."""
    tokens_per_forward: int | None = Field(None, ge=1)
    """Padded tokens in one forward pass; default: 2048 on a CPU, whose caches hold no more, else 16384, less on
    a GPU without room for so many."""
    rows_per_head_chunk: int | None = Field(None, ge=1)
    """Positions projected to the vocabulary at once, which bounds the memory of the head; default: 1024, less on a GPU
    without room for so many."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that vLLM spreads the teacher over."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """vLLM's key-value cache, GiB; default: 1 on a CPU, computed on a GPU that roles share, else what is left of the GPU."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of the GPU's memory vLLM may use; default: computed where roles share the GPU, else 0.9."""
    float32_head: bool | None = None
    """Let vLLM compute the logits of a half-precision teacher in float32, as engine = transformers always does; default: on
    a GPU, but for quantised weights."""
    engine_args: dict[str, Any] = {}
    """Further fields of vLLM's AsyncEngineArgs, as JSON, e.g. {"pipeline_parallel_size": 2, "quantization": "fp8"};
    weights are read from safetensors alone unless {"load_format": ...} says otherwise."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest sequence to score, tokens; default: what the model's config says, in vLLM on a GPU that roles share
    rollout.max_model_len or its default."""
    max_sequences_per_request: int = Field(4096, ge=1)
    """Sequences in one request."""
    max_tokens_per_request: int = Field(1_048_576, ge=1)
    """Tokens in one request, prompts included."""
    max_top_k: int | None = Field(None, ge=1)
    """Largest top_k; default: the vocabulary. The answer's size is bounded by max_answer_mib all the same."""
    max_answer_mib: int = Field(512, ge=1)
    """Largest answer, counted as 8 bytes a candidate, MiB."""
    max_body_mib: int = Field(64, ge=1)
    """Largest request body, MiB."""
    max_pending_requests: int = Field(64, ge=1)
    """Requests waiting for the engine; one more is answered 429 with Retry-After."""
    transfer_timeout_s: float = Field(120.0, gt=0)
    """How long a caller may take to send its body, and to take its answer, seconds; then its place is free again."""
    access_log: bool = False
    """A line of log for every answer, not only for refusals and failures."""
