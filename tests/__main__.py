"""`make test`: the unit tests in several processes, then one at a time what starts servers or measures time.

Arguments are pytest's, for both parts; a debugger, and what runs no test, want one process.
"""

import os
import subprocess
import sys

NOTHING_FOUND = 5
"""pytest's exit code where no test is left of a selection."""
_MOST_PROCESSES = 4
_PYTEST = [sys.executable, "-m", "pytest"]
_ONE_PROCESS = ("--pdb", "--trace", "--collect-only", "--co", "--markers", "--fixtures", "-h", "--help")


def main(arguments: list[str]) -> int:
    """Run both parts; returns the first exit code that is no success, or NOTHING_FOUND where neither found a test."""
    if any(word.startswith(_ONE_PROCESS) for word in arguments):
        return subprocess.call([*_PYTEST, *arguments])
    # Torch takes all cores in every process, and waits for them with all it has.
    beside_others = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = str(max(2, min(os.cpu_count() or 1, _MOST_PROCESSES)))
    parallel = ["--part", "parallel", "-n", processes, "--dist", "worksteal"]
    codes = [subprocess.call([*_PYTEST, *parallel, *arguments], env=beside_others)]
    if codes[0] in (0, 1, NOTHING_FOUND):  # else the arguments are wrong, or somebody has pressed Ctrl-C
        codes.append(subprocess.call([*_PYTEST, "--part", "alone", *arguments]))
    failed = [code for code in codes if code not in (0, NOTHING_FOUND)]
    return failed[0] if failed else min(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
