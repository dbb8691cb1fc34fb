"""The folder of a run, as whoever publishes its student reads it.

config.json, metrics.jsonl and summary.json are what the trainer wrote (trainer/output/report.py); student/,
checkpoints/step-N/ and adapter folders hold weights (trainer/output/saving.py). Nothing in it is taken for granted: it may be
of an interrupted run, of another version, or no run at all.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from services.errors import ConfigError, DataError

What = Literal["merged", "adapter"]

_WEIGHTS = {"merged": "config.json", "adapter": "adapter_config.json"}
"""The file that a folder of such weights has."""


@dataclass(frozen=True)
class Measured:
    """An evaluation, as a row of metrics.jsonl has it: exact_match, reverse_kl and so on, by name."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class RunRecords:
    """What a run has written about itself.

    Attributes:
        name: last name of its folder.
        options: config.json.
        step: the student's: how many steps it has been trained for; None where nothing says so.
        num_steps: how many were asked for.
        before, after: evaluations of the student at its start, and at or before `step`.
        is_complete: it has done all its steps.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    num_steps: int | None = None
    before: Measured | None = None
    after: Measured | None = None
    is_complete: bool = False

    def option(self, section: str, name: str) -> Any:
        """An option of the run, or None."""
        options = self.options.get(section)
        return options.get(name) if isinstance(options, Mapping) else None

    def text(self, section: str, name: str) -> str | None:
        """An option that is a text and not empty, or None."""
        value = self.option(section, name)
        return value if isinstance(value, str) and value else None


def read_records(run: Path, step: int | None = None) -> RunRecords:
    """What a run's folder says of the student of a step; default: of its last one.

    Raises:
        DataError: config.json is missing or not what a run writes.
    """
    options = _json(run / "config.json")
    if not isinstance(options, dict):
        raise DataError(f"{run / 'config.json'} is no table of options; give the folder of a run (output.dir)")
    last, num_steps, evaluations = 0, None, []
    for row in read_rows(run / "metrics.jsonl"):
        if isinstance(row.get("num_steps"), int):
            last, num_steps = row["step"], row["num_steps"]
        values = {name[5:]: value for name, value in row.items() if name.startswith("eval_") and is_number(value)}
        if "reverse_kl" in values:
            evaluations.append(Measured(row["step"], values))
    trained = step or last
    after = [one for one in evaluations if 0 < one.step <= trained]
    return RunRecords(
        name=run.resolve().name,
        options=options,
        step=trained or None,
        num_steps=num_steps,
        before=next((one for one in evaluations if one.step == 0), None),
        after=after[-1] if after else None,
        is_complete=trained == num_steps,
    )


def weights_folder(run: Path, what: What, step: int | None = None) -> Path:
    """The folder that is to be published.

    Args:
        step: of a checkpoint; default: the last student.

    Raises:
        ConfigError: there is none, or no run; says what there is.
    """
    if not run.is_dir():
        raise ConfigError(f"RUN_FOLDER = {str(run)!r} is no folder; give the folder of a run (output.dir)")
    if (run / _WEIGHTS["adapter"]).exists() or _holds_weights(run, "merged"):
        raise ConfigError(f"RUN_FOLDER = {str(run)!r} holds a model; give the folder of the run (output.dir) around it")
    if _holds_weights(folder := _place(run, what, step), what):
        return folder
    kind = "student" if what == "merged" else "adapter"
    if step is not None:
        steps = ", ".join(map(str, _saved_steps(run, what))) or "none"
        raise ConfigError(
            f"--step = {step}: {str(run)!r} holds no {kind} of it; checkpoints there are of steps: {steps}"
        )
    hint = "adapters are saved by runs with a [lora] section" if what == "adapter" else "the run saves it when it ends"
    raise ConfigError(f"RUN_FOLDER = {str(run)!r} holds no {kind}; {hint}")


def _place(run: Path, what: What, step: int | None) -> Path:
    whole = run / "student" if step is None else run / "checkpoints" / f"step-{step}"
    return whole if what == "merged" else whole / "adapter"


def _saved_steps(run: Path, what: What) -> list[int]:
    numbers = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
    steps = sorted(int(number) for number in numbers if number.isdecimal())
    return [step for step in steps if _holds_weights(_place(run, what, step), what)]


def _holds_weights(folder: Path, what: What) -> bool:
    config = folder / _WEIGHTS[what]
    return (
        config.is_file() and any(folder.glob("*.safetensors")) and (what == "adapter" or "model_type" in _json(config))
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}; give the folder of a run (output.dir)") from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl that have a step; it may not be there, or end in half a line."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def is_number(value: Any) -> bool:
    """Whether a value that was read is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
