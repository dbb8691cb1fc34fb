"""How much memory a process holds, and held at most."""

from pathlib import Path


class Memory:
    """Resident memory of a process of this machine, MiB."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def reset(self) -> None:
        """`peak` counts from here."""
        (self._folder / "clear_refs").write_text("5")

    def now(self) -> float:
        return self._read("VmRSS")

    def peak(self) -> float:
        return self._read("VmHWM")

    def _read(self, field: str) -> float:
        return int((self._folder / "status").read_text().split(f"{field}:")[1].split()[0]) / 1024
