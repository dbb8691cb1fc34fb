"""What a run leaves, and in which order."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from rich.console import Console

from services.config import RunConfig
from services.errors import ConfigError, OutputError, StartupError
from services.launch.summary_table import summary_table
from tests.unit.trainer.samples import batch_of, sample
from trainer.evaluation.evaluate import Evaluation
from trainer.output.report import FailedEvaluation, RunRecord, Summary, check_trackers, hear_of_tensorboard_once
from trainer.tiny.pair import build_tokenizer


def evaluation(**changes: object) -> Evaluation:
    values = {"policy_version": 2, "exact_match": 0.25, "teacher_exact_match": 0.99, "reverse_kl": 1.2}
    values |= {
        "reverse_kl_stderr": 0.05,
        "num_prompts": 10,
        "num_kl_tokens": 40,
        "num_quarantined": 1,
        "num_answers": 8,
    }
    return Evaluation(**(values | changes))  # type: ignore[arg-type]


AFTER = evaluation(policy_version=3, exact_match=1.0, reverse_kl=0.01, reverse_kl_stderr=None)
SUMMARY = Summary(evaluation(), AFTER, steps=3, wall_s=12.34, tokens=123)


def record(folder: Path, **output: object) -> RunRecord:
    config = RunConfig(output={"dir": str(folder), "samples_every_steps": 2, "samples_per_record": 1, **output})
    accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=str(folder))
    return RunRecord(config, accelerator, build_tokenizer())


def begun(folder: Path, **output: object) -> RunRecord:
    run = record(folder, **output)
    run.open_trackers()
    run.begin()
    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_trackers_are_told_the_project_and_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, object] = {}
    run = record(tmp_path / "out", project="my project")
    monkeypatch.setattr(
        run._accelerator, "init_trackers", lambda project, config: told.update(project=project, seed=config["seed"])
    )
    run.open_trackers()
    assert told == {"project": "my project", "seed": 0}


def test_a_run_leaves_config_metrics_samples_and_summary(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = begun(out)
    for step in (1, 2, 3):
        run.step(step, {"loss": 0.5})
        run.samples(step, batch_of([sample(0, 2, 3), sample(1, 2, 3)]))
    run.evaluation(3, evaluation(exact_match=None))
    assert not (out / "summary.json").exists()
    run.finish(SUMMARY)
    assert RunConfig.model_validate_json((out / "config.json").read_text()).output.dir == str(out)
    assert lines(out / "metrics.jsonl")[:2] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    measured = {"policy_version": 2, "teacher_exact_match": 0.99, "reverse_kl": 1.2, "reverse_kl_stderr": 0.05}
    measured |= {"num_prompts": 10, "num_kl_tokens": 40, "num_quarantined": 1, "num_answers": 8}
    assert lines(out / "metrics.jsonl")[3] == {"step": 3, **{f"eval_{k}": v for k, v in measured.items()}}
    written = lines(out / "samples.jsonl")  # of the first step and of every second one, and one of two
    assert [row["step"] for row in written] == [1, 2]
    assert len(written[0]["tokens"]) == len(written[0]["teacher_logprobs"]) == 3
    counts = {"num_prompts": 10, "num_kl_tokens": 40, "num_quarantined": 1, "num_answers": 8}
    assert json.loads((out / "summary.json").read_text()) == {
        "before": {"policy_version": 2, "exact_match": 0.25, "reverse_kl": 1.2, "reverse_kl_stderr": 0.05, **counts},
        "after": {"policy_version": 3, "exact_match": 1.0, "reverse_kl": 0.01, "reverse_kl_stderr": None, **counts},
        "teacher": {"exact_match": 0.99},
        "steps": 3,
        "wall_s": 12.3,
        "tokens": 123,
        "attempts": 1,
        "failed_evaluations": [],
    }
    assert list(out.rglob("events.out.tfevents.*"))


def test_a_finished_run_is_kept_unless_asked(tmp_path: Path) -> None:
    begun(tmp_path).finish(SUMMARY)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        record(tmp_path)
    replacing = record(tmp_path, overwrite=True)
    assert (tmp_path / "summary.json").exists()  # not before every check has passed
    replacing.begin()
    assert not (tmp_path / "summary.json").exists()


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match=r"output\.dir = .*file/out' cannot be written"):
        begun(tmp_path / "file" / "out")


def test_a_tracker_that_runs_into_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    run = begun(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    run._accelerator.log = full  # type: ignore[method-assign]
    with pytest.raises(OutputError, match="No space left on device"):
        run.step(1, {"loss": 0.5})


def test_a_tracker_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match="'wandb', which is not installed"):
        check_trackers(RunConfig(output={"trackers": ["tensorboard", "wandb"]}))


def test_the_table_shows_before_and_after() -> None:
    console = Console(record=True, width=100)
    console.print(summary_table(SUMMARY.as_json()))
    text = console.export_text()
    for shown in ("3 steps", "123 sampled tokens", "25.0%", "100.0%", "99.0%", "1.2000 ± 0.0500", "0.0100"):
        assert shown in text


def test_what_was_not_measured_is_said_below_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(tmp_path)
    run.finish(replace(SUMMARY, after=None, failed_evaluations=[FailedEvaluation(3, "the teacher [gone]")]))
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [f"student saved in {tmp_path / 'student'}", "not measured after step 3: the teacher [gone]"]


def test_a_log_whose_disk_is_full_does_not_fail_a_run_that_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(tmp_path)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        run.finish(SUMMARY)
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # or it fails once more when the file is closed
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3


def test_what_ends_tensorboards_thread_is_told_by_the_next_write_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.thread))
    hear_of_tensorboard_once()

    class _AsyncWriterThread(threading.Thread):
        def run(self) -> None:
            raise OSError("full")

    other = threading.Thread(target=lambda: 1 / 0)
    for thread in (_AsyncWriterThread(), other):
        thread.start()
        thread.join()
    assert told == [other]
