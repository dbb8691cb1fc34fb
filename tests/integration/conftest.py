"""One vLLM server for the whole session; the matrix of weight pushes starts its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.processes import Server, server
from tests.models import save_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tied and an untied model."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, name) for name in ("qwen3", "llama")}


@pytest.fixture(scope="session")
def rollout_server(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM with the tied model in float32, guarded by a key."""
    log: Path = tmp_path_factory.mktemp("logs") / "rollout.log"
    arguments = [
        "--student.model",
        models["qwen3"],
        "--rollout.max_model_len",
        "128",
        "--sampling.max_new_tokens",
        "16",
    ]
    with server("rollout", log, *arguments) as running:
        yield running
