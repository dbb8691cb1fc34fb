"""Which folder of a run is published, and what is said where there is none."""

from pathlib import Path
from typing import Any

import pytest

from services.errors import ConfigError, DataError
from services.hub.run_folder import read_records, weights_folder
from tests.unit.services.hub.finished_runs import finished_run


@pytest.fixture
def model(tiny_model_folder: Any) -> str:
    return str(tiny_model_folder("qwen3"))


def test_the_last_student_or_that_of_a_step(model: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", model, checkpoints={10: model})
    assert weights_folder(run, "merged") == run / "student"
    assert weights_folder(run, "merged", 10) == run / "checkpoints" / "step-10"


def test_an_adapter_lies_inside_of_its_student(model: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", model, checkpoints={10: model})
    for folder in (run / "student", run / "checkpoints" / "step-10"):
        (folder / "adapter").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / "adapter" / name).write_text("{}")
    assert weights_folder(run, "adapter") == run / "student" / "adapter"
    assert weights_folder(run, "adapter", 10) == run / "checkpoints" / "step-10" / "adapter"


@pytest.mark.parametrize(
    ("what", "step", "expected"),
    [
        ("merged", 11, r"--step = 11: .*holds no student of it; checkpoints there are of steps: 9, 10"),
        ("adapter", 9, r"--step = 9: .*holds no adapter of it; checkpoints there are of steps: none"),
        ("adapter", None, r"holds no adapter; adapters are saved by runs with a \[lora\] section"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(
    what: Any, step: int | None, expected: str, model: str, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "run", model, checkpoints={10: model, 9: model})
    (run / "checkpoints" / "step-8").mkdir()
    with pytest.raises(ConfigError, match=expected):
        weights_folder(run, what, step)


def test_a_folder_that_is_no_run_or_without_a_student_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder; give the folder of a run"):
        weights_folder(tmp_path / "absent", "merged")
    with pytest.raises(ConfigError, match="holds no student; the run saves it when it ends"):
        weights_folder(finished_run(tmp_path / "run", None), "merged")
    with pytest.raises(ConfigError, match="holds a model; give the folder of the run"):
        weights_folder(Path(model), "merged")


def test_the_options_of_a_run_are_no_configuration_of_a_model(model: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", model)
    (run / "stray.safetensors").touch()  # beside config.json, which is the run's
    assert weights_folder(run, "merged") == run / "student"


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b'"x"', b"[" * 100_000])
def test_records_that_are_none_name_their_file(content: bytes, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", None)
    (run / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"config\.json .*give the folder of a run"):
        read_records(run)
    (run / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json cannot be read: No such file"):
        read_records(run)


def test_a_run_without_metrics_has_no_step(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", None)
    (run / "metrics.jsonl").unlink()
    records = read_records(run)
    assert (records.step, records.before, records.after, records.is_complete) == (None, None, None, False)
