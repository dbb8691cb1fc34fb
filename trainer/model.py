"""The student in the trainer: loading, the forward pass over a micro-batch, optimizer and schedule.

Sequences run as padded rows (services/models/padding.py). Only positions that predict a completion token reach the head.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from services.config import OptimizerConfig, RunConfig, StudentConfig
from services.models.causal_lm import OutputHead, hidden_states, load_causal_lm, output_head
from trainer.dropout import disable_dropout
from trainer.loss.head import HeadOutput, support_logprobs


def load_student(config: StudentConfig, *, checkpointing: bool | None = None) -> PreTrainedModel:
    """The student with master weights in `config.dtype`, ready to train.

    Args:
        checkpointing: recompute activations in the backward pass; default: where the config says so.

    Raises:
        StartupError: the model cannot be loaded, computes its logits in an unknown way, or keeps a dropout.
    """
    assert config.model is not None
    model = load_causal_lm(
        config.model,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        init_kwargs=config.model_init_kwargs,
        key="student.model",
    )
    if config.disable_dropout:
        disable_dropout(model)
    if config.gradient_checkpointing if checkpointing is None else checkpointing:
        model.gradient_checkpointing_enable()
    output_head(model)  # refuse an unknown head now, not at the first step
    return model.train()


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside, whatever was before afterwards: dropout that trains must not be in what is measured."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def student_logprobs(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor,
    support_ids: torch.Tensor,
    temperature: float,
    compute_dtype: torch.dtype | None = None,
) -> HeadOutput:
    """Logprobs of the student at packed completion positions.

    The head is computed in float32 at least, as the teacher's and the rollout server's are.

    Args:
        input_ids: [B, T], padded on the right.
        positions: [N] into the B * T hidden states.
        token_ids: [N]; support_ids: [N, K].
        temperature: divides the logits.
        compute_dtype: of the body's products, where it is not that of the weights.
    """
    hidden = hidden_states(model, input_ids, compute_dtype).flatten(0, 1)[positions]
    head = head_of(model)
    return support_logprobs(
        hidden.to(torch.promote_types(hidden.dtype, torch.float32)),
        head.weight,
        token_ids,
        support_ids,
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )


def compute_dtype_of(config: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype of the body's products on a device."""
    found: torch.dtype = getattr(torch, config.compute_dtype(on_gpu=device.type == "cuda"))
    return found


def head_of(model: PreTrainedModel) -> OutputHead:
    """The output head, without the check that `load_student` has made."""
    return output_head(model, check=False)


def build_optimizer(model: PreTrainedModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; biases and norms are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, num_steps: int) -> LambdaLR:
    """Linear warm-up, then the configured decay down to min_lr_ratio at the last step."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        shape = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[config.schedule]
        return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape

    return LambdaLR(optimizer, factor)
