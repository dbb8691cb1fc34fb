"""`[optimizer]`: AdamW, its schedule, and clipping."""

from typing import Literal

from pydantic import Field

from services.config.section import Section


class OptimizerConfig(Section):
    """AdamW, its schedule, and clipping."""

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; biases and norms have none."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    max_skipped_updates: int = Field(3, ge=0)
    """Updates in a row that are skipped because their gradient is not finite; one more ends the run."""
