"""What holds for all tests."""

import signal
from collections import Counter
from pathlib import Path

import pytest

UNIT = Path(__file__).parent / "unit"
PARTS = ("unit", "servers", "alone")
"""unit tests; tests that start servers; of both those that measure time, beside which no other may run."""


def pytest_sessionstart() -> None:
    """A shell lets its background jobs ignore SIGINT, and what ignores it passes that on to what it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=PARTS, help="run the tests of one part of `make test`")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing what starts servers takes seconds in every process."""
    is_unit = collection_path == UNIT or UNIT in collection_path.parents
    is_folder = collection_path.is_dir() and UNIT.parent in collection_path.parents
    return True if is_folder and config.getoption("part") == ("servers" if is_unit else "unit") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a GPU, a container engine or many minutes runs only where it is asked for: `make test ARGS="-m gpu"`,
    `make test-containers`, `make test-long`."""
    asked, part = config.getoption("-m") or "", config.getoption("part")
    special = ("gpu", "containers", "long")

    def is_left_out(item: pytest.Item) -> bool:
        own_part = "alone" if item.get_closest_marker("alone") else "unit" if UNIT in item.path.parents else "servers"
        if part not in (None, own_part):
            return True
        return any(item.get_closest_marker(name) and name not in asked for name in special)

    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not is_left_out(item)]
    if part == "servers":
        # Two processes take file after file: the few long tests first, so that neither waits for the other at the end.
        tests_in_file = Counter(item.path for item in items)
        items.sort(key=lambda item: tests_in_file[item.path])
