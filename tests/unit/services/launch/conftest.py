"""What every test of `up` starts from."""

from pathlib import Path

import pytest

from services.config import RunConfig
from services.process.startup import free_port


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    model = str(tmp_path / "model")
    # Ports of its own: another run on this machine may be about to take the default ones.
    rollout_port = free_port("127.0.0.1", 0)
    teacher_port = free_port("127.0.0.1", 0, frozenset({rollout_port}))
    return RunConfig(
        student={"model": model},
        rollout={"port": rollout_port},
        teacher={"model": model, "port": teacher_port},
        output={"dir": str(tmp_path / "out")},
    )
