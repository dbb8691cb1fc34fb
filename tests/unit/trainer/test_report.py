"""What a run leaves, and in which order."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from rich.console import Console

from services.config import RunConfig
from services.errors import ConfigError
from tests.models import save_model
from tests.unit.trainer.test_batch import sample
from trainer.evaluate import Evaluation
from trainer.model import load_student
from trainer.report import RunRecord, Summary, check_trackers, summary_table
from trainer.tiny_pair import build_tokenizer

SUMMARY = Summary(Evaluation(0.25, 1.2, 10, 40), Evaluation(1.0, 0.01, 10, 44), 0.99, steps=3, wall_s=12.34, tokens=123)


def record(folder: Path, **output: object) -> RunRecord:
    config = RunConfig(output={"dir": str(folder), "samples_every_steps": 2, "samples_per_record": 1, **output})
    accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=str(folder))
    return RunRecord(config, accelerator, build_tokenizer())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_config_metrics_samples_student_and_summary(tmp_path: Path) -> None:
    run = record(tmp_path / "out")
    for step in (1, 2):
        run.step(step, {"loss": 0.5})
        run.samples(step, [sample(0, 2, 3), sample(1, 2, 3)])
    run.evaluation(2, Evaluation(None, 0.5, 4, 9))
    run.student(load_student(RunConfig(student={"model": save_model(tmp_path / "m", "llama")}).student))
    assert not (tmp_path / "out" / "summary.json").exists()
    run.finish(SUMMARY)
    out = tmp_path / "out"
    assert RunConfig.model_validate_json((out / "config.json").read_text()).output.dir == str(out)
    assert lines(out / "metrics.jsonl")[:2] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    assert lines(out / "metrics.jsonl")[2] == {
        "step": 2,
        "eval_reverse_kl": 0.5,
        "eval_num_prompts": 4,
        "eval_num_kl_tokens": 9,
    }
    (written,) = lines(out / "samples.jsonl")  # of step 2 alone, and one of two
    assert written["step"] == 2 and len(written["tokens"]) == len(written["teacher_logprobs"]) == 3
    assert json.loads((out / "summary.json").read_text()) == {
        "before": {"exact_match": 0.25, "reverse_kl": 1.2, "num_prompts": 10, "num_kl_tokens": 40},
        "after": {"exact_match": 1.0, "reverse_kl": 0.01, "num_prompts": 10, "num_kl_tokens": 44},
        "teacher": {"exact_match": 0.99},
        "steps": 3,
        "wall_s": 12.3,
        "tokens": 123,
    }
    assert (out / "student" / "model.safetensors").exists() and (out / "student" / "tokenizer.json").exists()
    assert list(out.rglob("events.out.tfevents.*"))


def test_a_finished_run_is_kept_unless_asked(tmp_path: Path) -> None:
    record(tmp_path).finish(SUMMARY)
    with pytest.raises(ConfigError, match="holds a finished run"):
        record(tmp_path)
    record(tmp_path, overwrite=True)
    assert not (tmp_path / "summary.json").exists()


def test_a_tracker_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match="'wandb', which is not installed"):
        check_trackers(RunConfig(output={"trackers": ["tensorboard", "wandb"]}))


def test_the_table_shows_before_and_after(tmp_path: Path) -> None:
    console = Console(record=True, width=100)
    console.print(summary_table(SUMMARY, tmp_path))
    text = console.export_text()
    for shown in ("3 steps", "123 sampled tokens", "25.0%", "100.0%", "99.0%", "1.2000", "0.0100"):
        assert shown in text
