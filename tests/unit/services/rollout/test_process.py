"""How the process of the rollout server ends, and what it started with it; vLLM itself is in tests/integration."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.process.parent import end_with_parent
from services.process.signals import Interrupted
from services.rollout import process
from services.rollout.process import Ending
from tests.integration.processes import is_running, wait_until


class Killed:
    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, number: int) -> None:
        self.numbers.append(number)


def test_a_signal_before_the_server_listens_ends_the_start() -> None:
    with pytest.raises(Interrupted, match="ended by SIGTERM"):
        Ending(Killed()).handle(signal.SIGTERM, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_begins_with_the_first_signal_and_is_forced_when_it_takes_too_long(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    killed, told = Killed(), Killed()
    ending = Ending(killed)
    ending.end_server = lambda: told(number)
    ending.handle(number, None)
    ending.handle(signal.SIGTERM, None)  # a service manager sends it twice without any hurry
    assert told.numbers == [number] and killed.numbers == []
    wait_until(lambda: killed.numbers == [number], 2.0)


def test_a_start_that_does_not_end_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_S", 0.1)
    killed = Killed()
    with pytest.raises(Interrupted):
        Ending(killed).handle(signal.SIGTERM, None)
    wait_until(lambda: killed.numbers == [signal.SIGTERM], 2.0)


def test_a_second_ctrl_c_does_not_wait() -> None:
    killed = Killed()
    ending = Ending(killed)
    ending.end_server = lambda: None
    ending.handle(signal.SIGTERM, None)
    ending.handle(signal.SIGINT, None)
    assert killed.numbers == [signal.SIGINT]


_STARTS_CHILDREN = """
import multiprocessing, os, sys, time
from services.rollout import process

def work(depth):
    print(os.getpid(), flush=True)
    if depth:
        start(depth - 1)
    time.sleep(60)

def start(depth):
    context = multiprocessing.get_context({method!r})
    context.Process(target=work, args=(depth,)).start()

if __name__ == "__mp_main__":  # as in the module itself, which is the main one of its process
    process.end_with_parent_and_be_one()
if __name__ == "__main__":
    os.environ[process._PARENT] = str(os.getpid())
    start(1)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_nothing_outlives_a_server_that_is_killed(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_STARTS_CHILDREN.format(method=method))
    server = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert server.stdout is not None
    pids = [int(server.stdout.readline()) for _ in range(2)]
    assert all(map(is_running, pids))
    server.kill()
    wait_until(lambda: not any(map(is_running, pids)), 5.0)
    server.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_a_process_whose_parent_is_gone_already_does_not_go_on() -> None:
    pid = os.fork()
    if pid == 0:
        end_with_parent(os.getpid(), signal.SIGKILL)  # as if the parent's place had been taken by another one
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGKILL


def test_what_is_killed_ends_with_the_number_of_the_signal(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from services.rollout import process\n"
        "if __name__ == '__main__':\n"
        "    os.environ[process._PARENT] = str(os.getpid())\n"
        "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    child.start()\n"
        "    print(child.pid, flush=True)\n"
        "    process._kill_everything(15)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == 143 and time.monotonic() - started < 20
    wait_until(lambda: not is_running(int(done.stdout)), 5.0)


def test_what_is_spawned_ends_with_its_own_exit_code_and_without_the_interpreters_end(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, multiprocessing, sys\n"
        "from services.rollout import process\n"
        "def work():\n"
        "    atexit.register(print, 'the interpreter ends')\n"
        "    print('works')\n"
        "    sys.exit(7)\n"
        "if __name__ == '__mp_main__':\n"
        "    process._end_as_forks_do()\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    child.start()\n"
        "    child.join()\n"
        "    print(child.exitcode)\n"
    )
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.stdout.split("\n") == ["works", "7", ""]
