"""GPUs that are not there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.services.fake_gpus import install_gpus


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *sizes: install_gpus(tmp_path, monkeypatch, sizes)
