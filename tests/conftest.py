"""What holds for all tests."""

import signal

import pytest


def pytest_sessionstart() -> None:
    """A shell lets its background jobs ignore SIGINT, and what ignores it passes that on to what it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a GPU, a container engine or many minutes runs only where it is asked for: `make test ARGS="-m gpu"`,
    `make test-containers`, `make test-long`."""
    asked = config.getoption("-m") or ""
    special = ("gpu", "containers", "long")
    left_out = [i for i in items if any(i.get_closest_marker(name) and name not in asked for name in special)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
