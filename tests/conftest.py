"""What holds for all tests."""

import signal

import pytest


def pytest_sessionstart() -> None:
    """A shell lets its background jobs ignore SIGINT, and what ignores it passes that on to what it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests run only where they are asked for: `make test ARGS="-m gpu"` on a machine with GPUs."""
    if "gpu" in (config.getoption("-m") or ""):
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]
