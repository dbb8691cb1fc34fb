"""Whole runs over recorded batches, without any server, that end and go on."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.config.output_dir import complete_checkpoints
from tests.scripted_teacher import ScriptedTeacher
from tests.unit.trainer.checkpoint.learners import all_state
from tests.unit.trainer.runs import opener, pushes_of, run_config, weights_of
from trainer import train as training
from trainer.output.report import Summary
from trainer.session import Session
from trainer.train import train
from trainer.user_objects import NOTHING, UserObjects

NUM_STEPS = 6
# What a run takes of time is not the same twice.
_TIMES = ("_s", "_per_s", "peak_memory_gib", "num_steps")


def nothing(session: Session) -> None:
    """Of a run that nobody disturbs."""


@dataclass
class Runs:
    """Runs of one student.

    Attributes:
        documents: of the steps, which the first run makes and the others are given instead of asking servers.
        ends: everything that decides how a run would go on, at the end of each.
    """

    folder: str
    tmp_path: Path
    teacher: ScriptedTeacher
    monkeypatch: pytest.MonkeyPatch
    documents: dict[int, bytes] = field(default_factory=dict)
    ends: list[dict[str, Any]] = field(default_factory=list)

    def go(
        self,
        name: str = "out",
        disturb: Callable[[Session], None] = nothing,
        objects: UserObjects = NOTHING,
        seed: int = 0,
        **sections: dict[str, Any],
    ) -> Summary:
        """One attempt."""
        base: dict[str, dict[str, Any]] = {"pipeline": {"steps": NUM_STEPS}, "output": {"save_every_steps": 2}}
        base["student"] = {"disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.2}}
        merged = {key: base.get(key, {}) | sections.get(key, {}) for key in base.keys() | sections.keys()}
        merged["student"] = {"model": self.folder} | merged["student"]

        def prepare(session: Session) -> None:
            self._give_recorded(session)
            disturb(session)
            session.record.finish = self._noting(session)  # type: ignore[method-assign]

        self.monkeypatch.setattr(training, "open_session", opener(self.teacher, prepare))
        config = run_config(self.folder, self.tmp_path / name, **merged)
        summary = train(config.model_copy(update={"seed": seed}), objects)
        assert summary is not None
        return summary

    def _noting(self, session: Session) -> Callable[[Summary], None]:
        finish = session.record.finish

        def noting(summary: Summary) -> None:
            self.ends.append(all_state(session.learner))
            finish(summary)

        return noting

    def _give_recorded(self, session: Session) -> None:
        """Of steps that were recorded their batches, of others what the stand-ins for servers make, which is recorded."""
        make = session.pipeline.next
        step = session.learner.finished_step

        async def recorded() -> bytes:
            nonlocal step
            step += 1
            if step not in self.documents:
                self.documents[step] = await make()
            return self.documents[step]

        session.pipeline.next = recorded  # type: ignore[method-assign]
        if self.documents:
            session.evaluator = None

    def out(self, name: str = "out") -> Path:
        return self.tmp_path / name

    def student(self, name: str = "out") -> dict[str, torch.Tensor]:
        return weights_of(AutoModelForCausalLM.from_pretrained(self.out(name) / "student"))

    def rows(self, file: str, name: str = "out") -> list[dict[str, Any]]:
        """Of a file, without times and attempts."""
        rows = [json.loads(line) for line in (self.out(name) / file).read_text().splitlines()]
        left_out = (*_TIMES, "attempt")
        return [{k: v for k, v in row.items() if not k.endswith(left_out)} for row in rows if "step" in row]

    def checkpoints(self, name: str = "out") -> list[int]:
        return list(complete_checkpoints(self.out(name)))


@pytest.fixture(scope="module")
def whole_run(tiny_model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The run that nobody disturbs, which has recorded its batches, in "whole"."""
    with ScriptedTeacher().serving() as teacher, pytest.MonkeyPatch.context() as patched:
        found = Runs(tiny_model_folder("llama"), tmp_path_factory.mktemp("runs"), teacher, patched)
        found.go("whole")
        yield found


@pytest.fixture
def runs(whole_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """With a copy of the run that nobody disturbs in "whole"."""
    shutil.copytree(whole_run.out("whole"), tmp_path / "whole")
    copies = {"documents": dict(whole_run.documents), "ends": list(whole_run.ends)}
    return replace(whole_run, tmp_path=tmp_path, monkeypatch=monkeypatch, **copies)


def ending(step: int, error: BaseException) -> Callable[[Session], None]:
    """Fails in the push after a step."""

    def disturb(session: Session) -> None:
        def fail(version: int) -> None:
            if version == step:
                raise error

        pushes_of(session).on_push = fail

    return disturb
