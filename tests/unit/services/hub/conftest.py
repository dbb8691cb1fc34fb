"""A hub on loopback for what runs in this process."""

from collections.abc import Iterator

import huggingface_hub
import pytest
from huggingface_hub.utils._http import default_client_factory

from tests.hub import TOKEN, Hub, running_hub


@pytest.fixture(scope="session")
def session_hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(session_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub that works, and that huggingface_hub talks to with a token that may write."""
    for part in (session_hub.repos, session_hub.objects, session_hub.faults, session_hub.asked):
        part.clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", session_hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield session_hub
    huggingface_hub.set_client_factory(default_client_factory)  # a push sets timeouts
