"""AdamW and the course of its learning rate."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from services.config import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; biases and norms are not decayed."""
    parameters = [p for p in module.parameters() if p.requires_grad]
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
