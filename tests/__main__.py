"""`make test`: unit tests in several processes, tests that start servers in two, then one at a time what measures time.

Arguments are pytest's, for all parts; a debugger, and what runs no test, want one process.
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
    """Run all parts; returns the first exit code that is no success, or NOTHING_FOUND where none found a test."""
    if any(word.startswith(_ONE_PROCESS) for word in arguments):
        return subprocess.call([*_PYTEST, *arguments])
    # Torch takes all cores in every process, and waits for them with all it has.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = str(max(2, min(os.cpu_count() or 1, _MOST_PROCESSES)))
    parts = [
        (["--part", "unit", "-n", processes, "--dist", "worksteal"], one_thread),
        # A file's tests share servers. More servers than two at once would only wait for each other, and for memory.
        (["--part", "servers", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"], None),
        (["--part", "alone"], None),
    ]
    codes = []
    for words, environment in parts:
        codes.append(subprocess.call([*_PYTEST, *words, *arguments], env=environment))
        if codes[-1] not in (0, 1, NOTHING_FOUND):  # the arguments are wrong, or somebody has pressed Ctrl-C
            break
    failed = [code for code in codes if code not in (0, NOTHING_FOUND)]
    return failed[0] if failed else min(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
