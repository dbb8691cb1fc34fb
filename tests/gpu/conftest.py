"""The models of all tests here, and memory that none of them leaves to the next."""

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.students import save_random


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random(tmp_path_factory.mktemp("model"), "0.6B")


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three layers of it, where how many there are says nothing."""
    return save_random(tmp_path_factory.mktemp("shallow"), "0.6B", num_hidden_layers=3)


@pytest.fixture(autouse=True)
def _empty_gpu() -> Iterator[None]:
    """What the test before left in cycles is no part of what the next one measures."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
