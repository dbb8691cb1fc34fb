"""What a machine, or a container, has left, from files as Linux writes them."""

from pathlib import Path

import pytest

from services.gpus.machine_memory import available_bytes

MEMINFO = (
    "MemTotal:       24600000 kB\nMemFree:         100000 kB\nMemAvailable:    8000000 kB\nHugePages_Total:       0\n"
)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_limits_it_is_what_the_system_says(tmp_path: Path) -> None:
    assert available_bytes(machine(tmp_path, {})) == 8_000_000 * 1024


@pytest.mark.parametrize("own", ["/pod/run", "/"])
def test_a_group_of_version_2_and_those_around_it_may_leave_less(own: str, tmp_path: Path) -> None:
    """In a container the group is the top one; what it has of the disk's cache is given back when it is wanted."""
    top = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": f"0::{own}\n",
        f"{top}/pod/run/memory.max": "max\n",
        f"{top}/pod/run/memory.current": "1000\n",
        f"{top}/memory.max": "5000000000\n",
        f"{top}/memory.current": "3000000000\n",
        f"{top}/memory.stat": "anon 7\ninactive_file 500000000\n",
    }
    assert available_bytes(machine(tmp_path, files)) == 2_500_000_000


def test_a_group_of_version_1_may_leave_less(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "4:cpu,memory:/docker/0a1b\n0::/\n",
        f"{top}/docker/0a1b/memory.limit_in_bytes": "6000000000\n",
        f"{top}/docker/0a1b/memory.usage_in_bytes": "6500000000\n",
        f"{top}/docker/0a1b/memory.stat": "inactive_file 1\ntotal_inactive_file 600000000\n",
        f"{top}/memory.limit_in_bytes": "9223372036854771712\n",
        f"{top}/memory.usage_in_bytes": "7000000000\n",
    }
    assert available_bytes(machine(tmp_path, files)) == 100_000_000


def test_it_is_not_known_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_this_machine_has_some() -> None:
    found = available_bytes()
    assert found is not None and 1 << 20 < found < 1 << 50
