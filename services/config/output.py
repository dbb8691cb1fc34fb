"""`[output]`: what a run leaves behind."""

from typing import Literal, Self

from pydantic import Field, model_validator

from services.config.section import Section


class OutputConfig(Section):
    """What a run leaves behind."""

    dir: str = Field("outputs/run", min_length=1)
    """Folder of the run."""
    overwrite: bool = False
    """Write into a folder that already holds a run, whose files are then replaced."""
    resume: bool = False
    """Go on from the newest complete checkpoint in dir, or refuse to start. Without it, and without overwrite, a run that dir
    holds unfinished goes on as well, and one that has no checkpoint yet begins."""
    resume_step: int | None = Field(None, ge=1)
    """Go on from the checkpoint of this step; what is there of later steps is done again."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    """accelerate trackers that receive the metrics."""
    project: str = "distillserve"
    """Project name at the trackers."""
    save_every_steps: int = Field(100, ge=0)
    """Steps between checkpoints in checkpoints/, each a student and what it takes to go on from there; 0: none. The student of the
    last finished step is saved however a run ends."""
    save_total_limit: int = Field(2, ge=1)
    """How many checkpoints are kept, the newest ones."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest reverse KL on held-out prompts; an evaluation that finds one makes a checkpoint."""
    samples_every_steps: int = Field(10, ge=1)
    """Steps between rows in samples.jsonl, from the first step on."""
    samples_per_record: int = Field(2, ge=1)
    """Completions written to samples.jsonl each time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.overwrite and (self.resume or self.resume_step is not None):
            raise ValueError(
                "output.overwrite = true replaces the run that output.resume or output.resume_step goes on from; give one of them"
            )
        if self.keep_best and self.save_every_steps == 0:
            raise ValueError(
                "output.keep_best = true keeps a checkpoint, and output.save_every_steps = 0 makes none; set it above 0"
            )
        return self
