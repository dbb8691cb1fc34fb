"""docs/gpu.md says of every test that needs a GPU what it proves."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_has_every_test_that_needs_a_gpu() -> None:
    files = (ROOT / "tests" / "gpu").glob("test_*.py")
    written = [name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M)]
    listed = re.findall(r"^\| `(test_\w+)` ", (ROOT / "docs" / "gpu.md").read_text(), re.M)
    assert sorted(written) == sorted(listed)
