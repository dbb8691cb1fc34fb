"""`[output]`: what a run leaves behind."""

from typing import Literal

from pydantic import Field

from services.config.section import Section


class OutputConfig(Section):
    """What a run leaves behind."""

    dir: str = Field("outputs/run", min_length=1)
    """Folder of the run."""
    overwrite: bool = False
    """Write into a folder that already holds a run, whose files are then replaced."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    """accelerate trackers that receive the metrics."""
    project: str = "distillserve"
    """Project name at the trackers."""
    save_every_steps: int = Field(100, ge=0)
    """Steps between students in checkpoints/; 0: none. The student of the last finished step is saved however a run ends."""
    save_total_limit: int = Field(2, ge=1)
    """How many students checkpoints/ keeps, the newest ones."""
    samples_every_steps: int = Field(10, ge=1)
    """Steps between rows in samples.jsonl, from the first step on."""
    samples_per_record: int = Field(2, ge=1)
    """Completions written to samples.jsonl each time."""
