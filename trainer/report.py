"""What a run leaves behind, and what it says at the end.

config.json      the resolved options            metrics.jsonl    one row per step
samples.jsonl    a few scored completions        quarantine.jsonl samples that were set aside
student/         the trained model               summary.json     before -> after, written last
(TensorBoard events and other trackers through accelerate)
"""

import importlib.util
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.config import RunConfig, check_output_dir
from services.errors import ConfigError, StartupError
from trainer.evaluate import Evaluation
from trainer.teacher_scores import ScoredSample


def check_trackers(config: RunConfig) -> None:
    """accelerate leaves out a tracker whose package is missing without a word.

    Raises:
        ConfigError: names the package to install.
    """
    for tracker in config.output.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(
                f"output.trackers names {tracker!r}, which is not installed; run: .venv/bin/pip install {tracker}"
            )


@dataclass(frozen=True)
class Summary:
    """summary.json, and the table at the end of a run."""

    before: Evaluation | None
    after: Evaluation | None
    teacher_exact_match: float | None
    steps: int
    wall_s: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        def side(evaluation: Evaluation | None) -> dict[str, Any] | None:
            return None if evaluation is None else asdict(evaluation)

        return {
            "before": side(self.before),
            "after": side(self.after),
            "teacher": {"exact_match": self.teacher_exact_match},
            "steps": self.steps,
            "wall_s": round(self.wall_s, 1),
            "tokens": self.tokens,
        }


class RunRecord:
    """Writes a run's files as the run goes.

    Args:
        accelerator: its trackers receive the metrics.

    Raises:
        ConfigError: output.dir holds a finished run.
        StartupError: output.dir cannot be written.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> None:
        self.dir = check_output_dir(config.output)
        self._config, self._accelerator, self._tokenizer = config, accelerator, tokenizer
        self._started = time.monotonic()
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            for stale in ("summary.json", "metrics.jsonl", "samples.jsonl", "quarantine.jsonl"):
                (self.dir / stale).unlink(missing_ok=True)
            (self.dir / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise StartupError(f"output.dir = {str(self.dir)!r} cannot be written: {error}") from error
        check_trackers(config)
        accelerator.init_trackers(config.output.project, config=_flat(config.model_dump(mode="json")))

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._started

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """One row of metrics.jsonl, flushed so that others can follow it, and the trackers."""
        self._append("metrics.jsonl", {"step": step, **metrics})
        self._accelerator.log(metrics, step=step)

    def evaluation(self, step: int, evaluation: Evaluation | None) -> None:
        if evaluation is not None:
            self.step(step, {f"eval_{name}": value for name, value in asdict(evaluation).items() if value is not None})

    def samples(self, step: int, samples: list[ScoredSample]) -> None:
        """A few completions of this step, token by token, every `samples_every_steps` steps."""
        if step % self._config.output.samples_every_steps:
            return
        for sample in samples[: self._config.output.samples_per_record]:
            self._append("samples.jsonl", {"step": step, **self._describe(sample)})

    def _describe(self, sample: ScoredSample) -> dict[str, Any]:
        prompt, completion = sample.rollout.prompt, sample.rollout.completion
        tokens = self._tokenizer.convert_ids_to_tokens(completion.token_ids.tolist())
        return {
            "row": prompt.row,
            "prompt": prompt.text,
            "completion": self._tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            "finish_reason": completion.finish_reason,
            "tokens": tokens,
            "student_logprobs": [round(float(x), 5) for x in completion.rollout_logprobs],
            "teacher_logprobs": [round(float(x), 5) for x in sample.teacher_token_logprobs],
        }

    def student(self, model: PreTrainedModel) -> None:
        """The trained model and its tokenizer, as an ordinary folder of safetensors."""
        model.save_pretrained(self.dir / "student")
        self._tokenizer.save_pretrained(self.dir / "student")

    def finish(self, summary: Summary) -> None:
        """summary.json, by rename, so that it exists only when the run is complete; then the table."""
        self._accelerator.end_training()
        partial = self.dir / "summary.json.partial"
        partial.write_text(json.dumps(summary.as_json(), indent=2) + "\n")
        partial.rename(self.dir / "summary.json")
        Console().print(summary_table(summary, self.dir))

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def summary_table(summary: Summary, output_dir: Path) -> Table:
    """before -> after, for people."""
    table = Table(
        title=f"{summary.steps} steps, {summary.tokens:,} sampled tokens, {summary.wall_s:.0f} s",
        caption=f"student saved in {output_dir / 'student'}",
    )
    for column in ("held-out", "before", "after", "teacher"):
        table.add_column(column, justify="left" if column == "held-out" else "right")

    def cell(evaluation: Evaluation | None, name: str, pattern: str) -> str:
        value = None if evaluation is None else getattr(evaluation, name)
        return "-" if value is None else format(value, pattern)

    teacher = "-" if summary.teacher_exact_match is None else f"{summary.teacher_exact_match:.1%}"
    exact = [cell(side, "exact_match", ".1%") for side in (summary.before, summary.after)]
    kl = [cell(side, "reverse_kl", ".4f") for side in (summary.before, summary.after)]
    table.add_row("exact match", *exact, teacher)
    table.add_row("reverse KL per token, nats", *kl, "0")
    return table


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys with values that every tracker takes."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat
