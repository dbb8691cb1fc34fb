"""`make bench`: run benchmarks by name (ARGS="head step"), all of them by default.

A benchmark is a module of this package with a `main()` that writes results/<its name>.json.
"""

import argparse
import importlib

ONLY_WHEN_NAMED = ("objectives", "trainer")
"""Half an hour of training runs; what needs a GPU."""
NAMES = (
    "step",
    "ranks",
    "push",
    "checkpoint",
    "precision",
    "head",
    "estimators",
    "throughput",
    "latency",
    "endurance",
    *ONLY_WHEN_NAMED,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description="measure; writes results/NAME.json")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all but {', '.join(ONLY_WHEN_NAMED)}"
    )
    names = parser.parse_args().names
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name in names or [name for name in NAMES if name not in ONLY_WHEN_NAMED]:
        importlib.import_module(f"{__package__}.{name}").main()


if __name__ == "__main__":
    main()
