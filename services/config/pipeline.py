"""`[pipeline]`: how much work a step is, and how it flows."""

from pydantic import Field

from services.config.section import DEFAULT_TOKENS, Section


class PipelineConfig(Section):
    """How much work a step is, and how it flows."""

    steps: int | None = Field(None, ge=1)
    """Batches to train on, updates_per_batch optimizer steps each; give this or epochs."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the prompts; give this or steps."""
    prompts_per_step: int = Field(32, ge=1)
    """Prompts a step completes."""
    samples_per_prompt: int = Field(1, ge=1)
    """Completions per prompt."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimizer steps on each batch, before the weights are pushed; from the second on the policy ratio is clipped."""
    texts_per_step: int = Field(32, ge=1)
    """Windows of data.lm_path per batch."""
    tokens_per_micro_batch: int | None = Field(None, ge=1)
    """Padded tokens in one forward and backward pass of the trainer; default: 16384, less on a GPU without room for so
    many."""
    max_staleness: int = Field(0, ge=0, le=0)
    """Steps a sample's policy may lag behind the trainer's; 0 is strictly on-policy, the one value this version has."""
    min_rollout_servers: int = Field(1, ge=1)
    """Rollout servers that each push of weights must reach: the run goes on without those that are away as long as so many are
    left, else it waits rollout_client.outage_s for them."""
    max_quarantine_rate: float = Field(0.05, ge=0, lt=1)
    """Share of a step's completions that may be set aside before the run stops: aborted ones, bad teacher rows."""

    @property
    def micro_batch_tokens(self) -> int:
        return self.tokens_per_micro_batch or DEFAULT_TOKENS
