"""Write deploy/locks/cpu.txt from the environment this runs in: `make lock`, after `make test` has passed in it."""

import importlib.metadata
import re
from pathlib import Path

_HEADER = "# The tested set for CPU, as pip constraints; written by `make lock`.\n"
# The project itself, and add-ons that set-up removes where they do not import.
_LEFT_OUT = {"distillserve", "pip", "torchvision", "torchaudio", "torchcodec"}


def main() -> None:
    versions = {
        re.sub(r"[-_.]+", "-", dist.metadata["Name"]).lower(): dist.version
        for dist in importlib.metadata.distributions()
    }
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items()) if name not in _LEFT_OUT]
    (Path(__file__).parent / "cpu.txt").write_text(_HEADER + "".join(lines))


if __name__ == "__main__":
    main()
