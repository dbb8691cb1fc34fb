"""How much of its memory this machine, or the container in which this process is, still has; loads no torch."""

from collections.abc import Iterator
from pathlib import Path

# Files of a control group: version 2, whose hierarchy has no name, and version 1.
_FILES = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(root: Path = Path("/")) -> int | None:
    """What a new process may take; None where the system does not say, as outside of Linux.

    Args:
        root: of the file system.
    """
    free = _numbers(root / "proc/meminfo").get("MemAvailable:")
    return None if free is None else min([free << 10, *_left_to_groups(root)])


def _left_to_groups(root: Path) -> Iterator[int]:
    """What the limits of this process's control groups leave, and those of the groups around them."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        for name in {"", "memory"}.intersection(controllers.split(",")):
            top, *names = _FILES[name]
            # Inside of a container its own group may be the top one, whatever the path says.
            group = root / top / path.strip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(root / top):
                    yield from _left(folder, *names)


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    limits, used = ([int(word) for word in _lines(folder / name) if word.isdecimal()] for name in (limit, usage))
    if limits and used:  # no limit is "max"
        yield max(0, limits[0] - used[0] + _numbers(folder / "memory.stat").get(reclaimable, 0))


def _numbers(path: Path) -> dict[str, int]:
    """Of lines that are a name and a number."""
    rows = (line.split() for line in _lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
