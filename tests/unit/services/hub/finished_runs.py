"""Folders as runs leave them."""

import json
import shutil
from pathlib import Path
from typing import Any

from services.config import RunConfig

MEASURED = {
    "reverse_kl": 1.25,
    "reverse_kl_stderr": 0.05,
    "num_prompts": 100,
    "num_kl_tokens": 900,
    "num_quarantined": 0,
}
BEFORE = {**MEASURED, "exact_match": 0.1, "teacher_exact_match": 0.99, "num_answers": 100}
AFTER = {**BEFORE, "reverse_kl": 0.015625, "reverse_kl_stderr": 0.002, "exact_match": 0.9}
OPTIONS: dict[str, Any] = {
    "student": {"model": "Qwen/Qwen3-0.6B"},
    "teacher": {"model": "Qwen/Qwen3-1.7B"},
    "data": {"path": "/home/someone/secret-project/train.jsonl", "eval_path": "/home/someone/held-out.jsonl"},
    "loss": {"gamma": 0.5, "top_k": 64},
    "pipeline": {"steps": 20},
}


def finished_run(
    folder: Path,
    student: str | None,
    *,
    options: dict[str, Any] | None = None,
    steps: int = 20,
    evaluations: dict[int, dict[str, Any]] | None = None,
    checkpoints: dict[int, str] | None = None,
) -> Path:
    """A run of `steps` steps out of 20.

    Args:
        student: a model's folder, which becomes student/.
        options: sections, over OPTIONS.
        evaluations: measured values by step; default: BEFORE and AFTER.
        checkpoints: models' folders by step.
    """
    folder.mkdir(parents=True)
    config = RunConfig(**{**OPTIONS, "output": {"dir": str(folder)}, **(options or {})})
    (folder / "config.json").write_text(config.model_dump_json(indent=2))
    rows = [{"step": step, "loss": 0.5, "num_steps": 20} for step in range(1, steps + 1)]
    measured = {0: BEFORE, 20: AFTER} if evaluations is None else evaluations
    rows += [{"step": step, **{f"eval_{name}": value for name, value in one.items()}} for step, one in measured.items()]
    rows.sort(key=lambda row: row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place, model in [("student", student), *((f"checkpoints/step-{n}", m) for n, m in (checkpoints or {}).items())]:
        if model is not None:
            shutil.copytree(model, folder / place)
    return folder
