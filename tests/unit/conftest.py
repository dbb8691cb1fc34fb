"""Model folders that several unit tests read and none writes to."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import save_model


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a random "qwen3" (tied) or "llama" (untied), saved when it is first asked for."""
    root: Path = tmp_path_factory.mktemp("models")
    folders: dict[str, str] = {}

    def folder(architecture: str) -> str:
        if architecture not in folders:
            folders[architecture] = save_model(root / architecture, architecture)
        return folders[architecture]

    return folder
