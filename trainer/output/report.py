"""What a run leaves behind, and what it says at the end.

config.json      the resolved options            metrics.jsonl    one row per step
samples.jsonl    a few scored completions        quarantine.jsonl samples that were set aside
journal.jsonl    which prompts each step has used (trainer/checkpoint/journal.py)
student/         the trained model (saving.py)   summary.json     before -> after, written last
(TensorBoard events and other trackers through accelerate)

A run that goes on from a checkpoint cuts off what was written of later steps, and then writes on.
"""

import importlib.util
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from services.config import RunConfig, check_output_dir
from services.errors import ConfigError, OutputError, StartupError
from services.hub.run_folder import read_rows
from services.launch.summary_table import summary_table
from services.process.files import append_line, cannot_write, sync_file, write_by_rename
from services.process.streams import writing_stdout
from services.wire.batch import TrainingBatch
from trainer.checkpoint.attempt import Attempt
from trainer.evaluation.evaluate import Evaluation

logger = logging.getLogger(__name__)


def hear_of_tensorboard_once() -> None:
    """Its writing thread prints what ends it, and raises the same at the next write, which a run ends with in one line."""
    others = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            others(args)

    threading.excepthook = hook


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
class FailedEvaluation:
    """An evaluation that was not made, and why."""

    step: int
    reason: str


@dataclass(frozen=True)
class Summary:
    """summary.json, and the table at the end of a run."""

    before: Evaluation | None
    after: Evaluation | None
    steps: int
    wall_s: float
    tokens: int
    failed_evaluations: list[FailedEvaluation] = field(default_factory=list)
    attempts: int = 1

    @property
    def teacher_exact_match(self) -> float | None:
        """That of the last evaluation that measured it: the teacher does not change."""
        measured = [side.teacher_exact_match for side in (self.before, self.after) if side is not None]
        return measured[-1] if measured else None

    def as_json(self) -> dict[str, Any]:
        def side(evaluation: Evaluation | None) -> dict[str, Any] | None:
            if evaluation is None:
                return None
            return {name: value for name, value in asdict(evaluation).items() if name != "teacher_exact_match"}

        return {
            "before": side(self.before),
            "after": side(self.after),
            "teacher": {"exact_match": self.teacher_exact_match},
            "steps": self.steps,
            "wall_s": round(self.wall_s, 1),
            "tokens": self.tokens,
            "attempts": self.attempts,
            "failed_evaluations": [asdict(failed) for failed in self.failed_evaluations],
        }


class RunRecord:
    """Writes a run's files as the run goes.

    Args:
        accelerator: its trackers receive the metrics.
        attempt: which process of which run this is; default: the first one of a run.

    Raises:
        ConfigError: output.dir holds an earlier run, or a tracker is not installed.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        attempt: Attempt | None = None,
    ) -> None:
        self.dir = check_output_dir(config)
        check_trackers(config)
        self._config, self._accelerator, self.tokenizer = config, accelerator, tokenizer
        self.attempt = attempt or Attempt()
        self._started = time.monotonic() - self.attempt.wall_s
        self.reverse_kls: dict[int, float] = {}
        """Of held-out prompts, by the step after which they were measured; also by earlier attempts."""

    def open_trackers(self) -> None:
        """The last check, before anything is replaced: a tracker may want a key or a network.

        Raises:
            StartupError: output.dir cannot be written.
        """
        options = _flat(self._config.model_dump(mode="json"))
        with self._starting():
            self.dir.mkdir(parents=True, exist_ok=True)
            hear_of_tensorboard_once()
            self._accelerator.init_trackers(self._config.output.project, config=options, **self._going_on())

    def begin(self) -> None:
        """Put the files of this run in the place of those of an earlier one, or behind what earlier attempts have written up to
        the step after which this one goes on; every check has passed.

        Raises:
            StartupError: output.dir cannot be written.
        """
        with self._starting():
            (self.dir / "summary.json").unlink(missing_ok=True)
            if self.attempt.finished_step:
                self._cut_back()
            else:
                for stale in _ROWS:
                    (self.dir / stale).unlink(missing_ok=True)
                self.attempt.announce(self.dir)
            write_by_rename(self.dir / "config.json", (self._config.model_dump_json(indent=2) + "\n").encode())

    @contextmanager
    def _starting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, OutputError) as error:
            raise StartupError(f"output.dir = {str(self.dir)!r} cannot be written: {error}") from error

    def _going_on(self) -> dict[str, Any]:
        """How the trackers are told that what they have of later steps is done again."""
        step = self.attempt.finished_step
        trackers = self._config.output.trackers
        options: dict[str, Any] = {}
        if step and "tensorboard" in trackers:
            options["tensorboard"] = {"purge_step": step + 1}
        if "wandb" in trackers:
            options["wandb"] = {"id": self.attempt.run, "resume": "allow"}
        return {"init_kwargs": options} if options else {}

    def _cut_back(self) -> None:
        """Leave the rows of steps up to the one after which the run goes on, and those of no step."""
        last = self.attempt.finished_step
        for name in _ROWS:
            path = self.dir / name
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            rows = [(line, _step_of(line)) for line in lines]
            kept = [line for line, step in rows if line.endswith(b"\n") and (step is None or step <= last)]
            if len(kept) < len(lines):
                write_by_rename(path, b"".join(kept))
        self.reverse_kls = reverse_kls_until(self.dir, last)

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._started

    def token(self, token_id: int) -> str:
        """The tokenizer's spelling of an id."""
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """One row of metrics.jsonl, which others can follow, and the trackers.

        Raises:
            OutputError: it cannot be written.
        """
        self._append("metrics.jsonl", {"step": step, **metrics})
        try:
            self._accelerator.log(metrics, step=step)
        except OSError as error:  # TensorBoard's writer says at the next row that the disk is full
            raise cannot_write(self.dir / "tracker", error) from error

    def used(self, step: int, batch: TrainingBatch) -> None:
        """The step's row of the journal.

        Raises:
            OutputError: it cannot be written.
        """
        self._append("journal.jsonl", {"step": step, "attempt": self.attempt.number, **batch.used})

    def sync(self) -> None:
        """Wait until what was written so far is on the disk.

        Raises:
            OutputError: it cannot be.
        """
        for path in (path for path in (self.dir / name for name in _ROWS) if path.exists()):
            try:
                sync_file(path)
            except OSError as error:
                raise cannot_write(path, error) from error

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """As `step`, the names with "eval_" before them."""
        self.reverse_kls[step] = evaluation.reverse_kl
        self.step(step, {f"eval_{name}": value for name, value in asdict(evaluation).items() if value is not None})

    def samples(self, step: int, batch: TrainingBatch) -> None:
        """A few completions of this step, token by token, at the first and every `samples_every_steps` steps."""
        if step != 1 and step % self._config.output.samples_every_steps:
            return
        for index in range(min(self._config.output.samples_per_record, len(batch))):
            self._append("samples.jsonl", {"step": step, **self._describe(batch, index)})

    def _describe(self, batch: TrainingBatch, index: int) -> dict[str, Any]:
        tokens = batch.completion(index)
        token_ids = batch.token_ids[tokens]
        return {
            "row": int(batch.rows[index]),
            "prompt": batch.texts[index],
            "completion": self.tokenizer.decode(token_ids, skip_special_tokens=True),
            "finish_reason": "length" if batch.truncated[index] else "stop",
            "tokens": self.tokenizer.convert_ids_to_tokens(token_ids.tolist()),
            "student_logprobs": [round(float(x), 5) for x in batch.rollout_logprobs[tokens]],
            "teacher_logprobs": [round(float(x), 5) for x in batch.teacher_token_logprobs[tokens]],
            **({} if batch.rewards is None else {"rewards": _by_name(batch.reward_names, batch.rewards[index])}),
        }

    def finish(self, summary: Summary) -> None:
        """summary.json, which exists only when the run is complete; then the table.

        Raises:
            OutputError: it cannot be written.
        """
        self.close()
        write_by_rename(self.dir / "summary.json", (json.dumps(summary.as_json(), indent=2) + "\n").encode())
        console = Console()
        lines = [f"student saved in {self.dir / 'student'}"]
        lines += [f"not measured after step {failed.step}: {failed.reason}" for failed in summary.failed_evaluations]
        with suppress(OutputError), writing_stdout():  # all of it is in summary.json
            console.print(summary_table(summary.as_json()))
            for line in lines:
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Let the trackers write what they hold, however the run ends; once more does nothing."""
        try:
            self._accelerator.end_training()
        except OSError as error:
            logger.warning("the trackers could not be closed: %s", error)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        append_line(self.dir / name, json.dumps(row, ensure_ascii=False).encode())


_ROWS = ("metrics.jsonl", "samples.jsonl", "quarantine.jsonl", "journal.jsonl")
"""Files that grow by a row."""


def reverse_kls_until(folder: Path, step: int) -> dict[int, float]:
    """What the evaluations up to a step have measured, by their steps."""
    rows = read_rows(folder / "metrics.jsonl")
    return {row["step"]: row["eval_reverse_kl"] for row in rows if "eval_reverse_kl" in row and row["step"] <= step}


def _step_of(line: bytes) -> int | None:
    """That of a row, None where it is of none; a line that is no row is of a step that is done again."""
    try:
        row = json.loads(line)
    except ValueError:
        return sys.maxsize
    step = row.get("step") if isinstance(row, dict) else sys.maxsize
    return step if isinstance(step, int) else None


def _by_name(names: list[str], rewards: np.ndarray) -> dict[str, float | None]:
    """Of one completion; None where a function does not apply."""
    return {name: None if np.isnan(x) else float(x) for name, x in zip(names, rewards, strict=True)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys with values that every tracker takes."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat
