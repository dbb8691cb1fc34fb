"""Signals that end a program: at once before anything is worth keeping, in order afterwards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.process.signals import Interrupted, Interruption, run_until_signalled

# Says "working", is cancelled or not, and says how it went; argv: whether the work is deferred, and what happens on cancel.
WORK = """
import asyncio, sys, time
from services.process.signals import Interrupted, run_until_signalled

async def work(interruption):
    if sys.argv[1] == "deferred":
        interruption.defer()
    try:
        print("working", flush=True)
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        print("cancelled", flush=True)
        if sys.argv[2] == "slow":
            time.sleep(60)
        raise
    finally:
        print("cleaned up", flush=True)

try:
    run_until_signalled(work)
except Interrupted as error:
    print(error, flush=True)
    sys.exit(128 + error.number)
"""


def started(*arguments: str, before: str = "") -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", before + WORK, *arguments], stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("how", ["deferred", "at once"])
def test_each_signal_lets_the_work_clean_up_and_is_the_exit_code(how: str, number: signal.Signals) -> None:
    process = started(how, "quick")
    process.send_signal(number)
    said, _ = process.communicate(timeout=20)
    assert said.split("\n")[-3:] == ["cleaned up", f"ended by {number.name}", ""]
    assert process.returncode == 128 + number


def test_a_second_ctrl_c_does_not_wait_and_other_signals_do() -> None:
    process = started("deferred", "slow")
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "cancelled\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)  # a service manager's, to the whole group
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and time.monotonic() - begun < 20


def test_a_signal_behind_the_end_of_the_work_does_not_wait_for_what_is_left() -> None:
    """Threads that nobody joins, say: there is no work any more that could be cancelled."""
    seen: list[Interruption] = []

    async def work(interruption: Interruption) -> None:
        interruption.defer()
        seen.append(interruption)

    run_until_signalled(work)
    with pytest.raises(Interrupted, match="ended by SIGTERM"):
        seen[0].handle(signal.SIGTERM, None)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    process = started("deferred", "quick", before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a PID namespace needs root on Linux")
def test_the_first_process_of_a_container_ends_too() -> None:
    """The kernel drops signals for which process 1 has no handler."""
    script = "import sys, time; print('working', flush=True); time.sleep(60)"
    command = "from services.cli import main; import services.cli as cli\n"
    command += f"cli._dispatch = lambda argv: exec({script!r}) or 0\nmain([])"
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    if (line := process.stdout.readline()) != "working\n":
        pytest.fail(f"{line}{process.stderr.read()}")
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(child, signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 143 and said == "distillserve: ended by SIGTERM\n"
