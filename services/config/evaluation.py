"""`[evaluation]`: what is measured on held-out prompts."""

from pydantic import Field

from services.config.section import Section


class EvaluationConfig(Section):
    """What is measured before and after (and during) training on data.eval_path: exact match greedily, reverse KL on samples."""

    num_prompts: int | None = Field(None, ge=1)
    """Held-out prompts to use; default: all rows of data.eval_path."""
    every_steps: int = Field(0, ge=0)
    """Steps between evaluations during training; 0: only before and after."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest completion, tokens; default: sampling.max_new_tokens."""
    top_k: int | None = Field(None, ge=1)
    """Teacher logprobs per position for the reverse KL, which is unbiased with any number of them; default: 64, or a whole
    vocabulary of up to 1024 tokens."""
