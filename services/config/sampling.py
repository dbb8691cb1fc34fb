"""`[sampling]`: how the student completes prompts during training."""

from pydantic import Field

from services.config.section import Section


class SamplingConfig(Section):
    """How the student completes prompts during training."""

    max_new_tokens: int = Field(256, ge=1)
    """Longest completion, tokens."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1.0 is off."""
    top_k: int = Field(0, ge=0)
    """Sample among the k likeliest tokens; 0 is off."""
