"""`DistillationTrainer.push_to_hub`: what it sends where."""

from pathlib import Path
from typing import Any

import pytest

from services.config import RunConfig
from tests.hub import Hub
from tests.unit.services.hub.conftest import hub, session_hub  # noqa: F401
from tests.unit.services.hub.finished_runs import finished_run
from trainer import DistillationTrainer


def test_the_student_of_the_run_is_pushed_with_its_options(
    tiny_model_folder: Any,
    tmp_path: Path,
    hub: Hub,  # noqa: F811
) -> None:
    folder = tiny_model_folder("llama")
    run = finished_run(tmp_path / "run", folder, checkpoints={10: folder})
    trainer = DistillationTrainer(RunConfig(output={"dir": str(run)}))
    url = trainer.push_to_hub("me/student")
    assert url.startswith(f"{hub.url}/me/student/commit/") and "model.safetensors" in hub.files("me/student")
    options: dict[str, Any] = {
        "step": 10,
        "dtype": "bfloat16",
        "private": True,
        "revision": "v1",
        "commit_message": "Ten",
    }
    trainer.push_to_hub("me/other", **options)
    assert hub.repos["me/other"].messages == [("v1", "Ten")] and hub.repos["me/other"].private
    assert len(hub.files("me/other", "v1")["model.safetensors"]) < 0.6 * len(
        hub.files("me/student")["model.safetensors"]
    )


def test_other_ranks_push_nothing(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (
        DistillationTrainer(RunConfig(output={"dir": str(tmp_path)})).push_to_hub("me/student") == "" and not hub.repos
    )
