"""Whole runs of `train` with objects of a user, over the stand-ins of runs.py."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_teacher import ScriptedTeacher
from tests.unit.trainer.runs import opener, run_config
from trainer import train as training
from trainer.output.report import Summary
from trainer.session import Session
from trainer.train import train
from trainer.user_objects import UserObjects

Run = Callable[..., Summary]
"""Takes objects, what is done to the open session (`prepare`), and sections of the config."""


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    with ScriptedTeacher().serving() as serving:
        yield serving


@pytest.fixture
def run(tiny_model_folder: Any, tmp_path: Path, teacher: ScriptedTeacher, monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(
        objects: UserObjects, prepare: Callable[[Session], None] = lambda session: None, **sections: dict[str, Any]
    ) -> Summary:
        monkeypatch.setattr(training, "open_session", opener(teacher, prepare))
        summary = train(run_config(tiny_model_folder("llama"), tmp_path / "out", **sections), objects)
        assert summary is not None
        return summary

    return run
