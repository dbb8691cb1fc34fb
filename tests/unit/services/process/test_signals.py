"""Signals that end a program: at once before anything is worth keeping, in order afterwards."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from services.process.signals import Interrupted, Interruption

# Says "working", waits or computes, and says how it went; argv: whether signals are deferred, and how long the end takes.
WORK = """
import sys, time
from services.process.signals import Interrupted, interruptible

def work(interruption):
    if sys.argv[1] != "at once":
        interruption.defer()
    try:
        print("working", flush=True)
        if sys.argv[1] == "computing":
            while True:
                time.sleep(0.01)
                interruption.check()
        with interruption.raising():
            time.sleep(60)
    except Interrupted:
        print("interrupted", flush=True)
        if sys.argv[2] == "slow":
            with interruption.raising():
                time.sleep(60)
        raise
    finally:
        print("cleaned up", flush=True)

try:
    with interruptible() as interruption:
        work(interruption)
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
@pytest.mark.parametrize("how", ["waiting", "computing", "at once"])
def test_each_signal_lets_the_work_clean_up_and_is_the_exit_code(how: str, number: signal.Signals) -> None:
    process = started(how, "quick")
    process.send_signal(number)
    said, _ = process.communicate(timeout=20)
    assert said.split("\n")[-3:] == ["cleaned up", f"ended by {number.name}", ""]
    assert process.returncode == 128 + number


def test_a_second_ctrl_c_does_not_wait_and_other_signals_do() -> None:
    process = started("waiting", "slow")
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "interrupted\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)  # a service manager's, to the whole group
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and time.monotonic() - begun < 20


def test_a_deferred_signal_is_raised_where_the_work_may_end_and_once() -> None:
    interruption = Interruption()
    interruption.defer()
    interruption.handle(signal.SIGTERM, None)
    interruption.handle(signal.SIGINT, None)  # nobody has begun to end yet
    with pytest.raises(Interrupted, match="ended by SIGTERM"), interruption.raising():
        pytest.fail("the block has begun")
    interruption.check()
    interruption.handle(signal.SIGINT, None)  # what is done in order outside is not torn
    with interruption.raising():
        interruption.handle(signal.SIGTERM, None)
        with pytest.raises(Interrupted, match="ended by SIGINT"):
            interruption.handle(signal.SIGINT, None)


def test_what_was_lost_in_a_destructor_is_raised_by_the_next_signal() -> None:
    interruption = Interruption()
    interruption.defer()
    with pytest.raises(Interrupted, match="ended by SIGHUP"), interruption.raising():
        with suppress(Interrupted):
            interruption.handle(signal.SIGHUP, None)
        interruption.handle(signal.SIGTERM, None)
        pytest.fail("not raised")


def test_at_the_end_only_a_second_ctrl_c_is_in_a_hurry() -> None:
    interruption = Interruption()
    interruption.end()
    with interruption.raising():
        interruption.handle(signal.SIGINT, None)
        with pytest.raises(Interrupted):
            interruption.handle(signal.SIGINT, None)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    process = started("waiting", "quick", before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
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
