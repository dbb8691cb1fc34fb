"""One vLLM server and one teacher for the whole session; tests that end a server, or need its queue, start their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.processes import KEY, Server, server
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


@pytest.fixture(scope="session")
def teacher_server(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A teacher with low limits, guarded by a key, for tests that leave it as they found it: serving."""
    limits = {"max_body_mib": 1, "max_pending_requests": 16, "max_top_k": 100, "max_sequences_per_request": 64}
    limits |= {"tokens_per_forward": 1024, "max_tokens_per_request": 4096}
    options = [word for name, value in limits.items() for word in (f"--teacher.{name}", str(value))]
    log: Path = tmp_path_factory.mktemp("logs") / "teacher.log"
    with server("teacher", log, "--teacher.model", models["qwen3"], *options) as running:
        yield running
    said = log.read_text()
    assert "Traceback" not in said and KEY not in said, said[-5000:]
