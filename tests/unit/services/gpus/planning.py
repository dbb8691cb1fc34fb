"""The README's example, planned."""

from typing import Any

from services.config import RunConfig
from services.gpus.plan import MemoryPlan, plan
from tests.unit.services.shapes import QWEN3_0_6B, QWEN3_1_7B

SHAPES = {"student": QWEN3_0_6B, "teacher": QWEN3_1_7B}


def run(**changes: dict[str, Any]) -> RunConfig:
    """The README's example for own models, with changes to its sections."""
    sections: dict[str, dict[str, Any]] = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher", "dtype": "bfloat16"},
        "rollout": {"dtype": "bfloat16"},
        "data": {"path": "prompts.jsonl", "eval_path": "held-out.jsonl"},
        "sampling": {"max_new_tokens": 512},
        "pipeline": {"prompts_per_step": 64, "steps": 200},
        "optimizer": {"learning_rate": 1e-5},
    }
    return RunConfig(**{name: sections.get(name, {}) | changes.get(name, {}) for name in {**sections, **changes}})


def planned(config: RunConfig, role: str | None = None) -> MemoryPlan:
    found = plan(config, role, SHAPES.get)
    assert found is not None
    return found
