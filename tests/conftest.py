"""What holds for all tests."""

import signal
from pathlib import Path

import pytest

UNIT = Path(__file__).parent / "unit"


def pytest_sessionstart() -> None:
    """A shell lets its background jobs ignore SIGINT, and what ignores it passes that on to what it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parts = "parallel: unit tests but those marked alone, which may run beside others; alone: all other tests"
    parser.addoption("--part", choices=("parallel", "alone"), help=parts)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing what starts servers takes seconds in every process."""
    is_outside = collection_path.is_dir() and UNIT.parent in collection_path.parents and collection_path != UNIT
    is_outside = is_outside and UNIT not in collection_path.parents
    return True if is_outside and config.getoption("part") == "parallel" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a GPU, a container engine or many minutes runs only where it is asked for: `make test ARGS="-m gpu"`,
    `make test-containers`, `make test-long`."""
    asked, part = config.getoption("-m") or "", config.getoption("part")
    special = ("gpu", "containers", "long")

    def is_left_out(item: pytest.Item) -> bool:
        is_parallel = UNIT in item.path.parents and item.get_closest_marker("alone") is None
        if part is not None and is_parallel != (part == "parallel"):
            return True
        return any(item.get_closest_marker(name) and name not in asked for name in special)

    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not is_left_out(item)]
