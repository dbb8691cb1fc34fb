"""What a checkpoint's state.json says of the run, of which kind each value is: looked at before anything goes on from it."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, NonNegativeFloat, NonNegativeInt, PositiveInt

from services.clients.teacher_probe import ProbeAnswer
from trainer.checkpoint.plain_values import from_json
from trainer.evaluation.evaluate import Evaluation
from trainer.output.report import FailedEvaluation


class _Positions(BaseModel):
    prompts: NonNegativeInt
    texts: NonNegativeInt


class _Learner(BaseModel):
    optimizer: str
    groups: list[dict[str, Any]]
    state: dict[str, dict[str, dict[str, Any]]]
    schedule: Annotated[dict[str, Any], BeforeValidator(from_json)]


class SavedState(BaseModel):
    run: str
    attempt: PositiveInt
    num_steps: PositiveInt
    rows: list[tuple[str, str]]
    tokenizer: str
    base: str | None
    teachers: dict[str, ProbeAnswer]
    versions: dict[str, str]
    positions: _Positions
    num_tokens: NonNegativeInt
    wall_s: NonNegativeFloat
    before: Annotated[Evaluation | None, BeforeValidator(from_json)]
    failed_evaluations: list[FailedEvaluation]
    learner: _Learner
