"""`[student]`: the model that learns."""

from typing import Any, Literal

from services.config.section import Dtype, Section


class StudentConfig(Section):
    """The model that learns."""

    model: str | None = None
    """Folder or hub id of a causal LM; required."""
    model_init_kwargs: dict[str, Any] = {}
    """Further keyword arguments of transformers' from_pretrained, as JSON."""
    dtype: Dtype = "float32"
    """Dtype of the trainer's master weights and optimizer state; float16 cannot be trained, bfloat16 loses small steps."""
    disable_dropout: bool = True
    """Set every dropout probability of the student to zero."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype in which the body runs forward and backward; master weights keep `dtype`, the head is float32. auto: bfloat16 on
    a GPU when rollout.dtype is half precision, else `dtype`."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more time; default: on a GPU."""
    attn_implementation: str | None = None
    """Attention of transformers, e.g. "sdpa", "eager" or "flash_attention_2"; a flash attention takes packed sequences instead
    of padded rows. Default: transformers' own choice."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings along; off unless you have read that code."""
    cuda_devices: str | None = None
    """GPUs of the trainer, as CUDA_VISIBLE_DEVICES takes them, e.g. "1", "0,1" or "GPU-8932f937"; "": none. The ranks of a
    machine take the first ones, one each. Default: those that it sees."""
