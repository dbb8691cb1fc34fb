"""deploy/setup.sh: which build is installed, and what must be there for it. Python and pip are a script that notes its calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from services.gpus.cards import NEEDED_DRIVER

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "cp", "dirname", "env", "head", "mkdir", "rm", "sed", "sh", "sort")

FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
    *sysconfig*) echo "{headers}" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && rm -f "$3/no-pip" ;;
    "-m pip --version") [ ! -e "${{0%/bin/python}}/no-pip" ] ;;
    *importlib.metadata*) cat "${{0%/bin/python}}/made-for" ;;
esac
"""


class Machine:
    """Folders of a machine without anything but a shell's tools, and what pip was asked to install on it."""

    def __init__(self, folder: Path) -> None:
        self.venv, self.log, self.tools, self.headers = (folder / name for name in ("venv", "log", "tools", "include"))
        for path in (self.tools, self.headers):
            path.mkdir()
        for tool in TOOLS:
            (self.tools / tool).symlink_to(shutil.which(tool) or "")
        (self.headers / "Python.h").touch()
        self.has("gcc")
        self.python = folder / "python3"
        self.python.write_text(FAKE_PYTHON.format(log=self.log, headers=self.headers))
        self.python.chmod(0o755)

    def has(self, tool: str) -> None:
        (self.tools / tool).write_text("#!/bin/sh\n")
        (self.tools / tool).chmod(0o755)

    def lacks(self, tool: str) -> None:
        (self.tools / tool).unlink()

    def set_up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        variables = {"PATH": str(self.tools), "PYTHON": str(self.python), "VENV": str(self.venv)}
        variables |= {"DRIVER_FILE": str(self.tools / "no-driver")} | environment
        command = [str(self.tools / "bash"), str(ROOT / "deploy" / "setup.sh")]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)

    @property
    def installed(self) -> list[str]:
        return [line.partition(" install ")[2] for line in self.log.read_text().splitlines() if " install " in line]

    @property
    def made_venv(self) -> bool:
        return f"-m venv {self.venv} --clear" in self.log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_build_for_gpus_is_asked_for_by_its_exact_version(machine: Machine) -> None:
    """To `==` an index's +cpu build is as good."""
    done = machine.set_up(BACKEND="gpu")
    assert done.returncode == 0, done.stderr
    torch = next(words for words in machine.installed if "torch=" in words)
    assert "torch===2.13.0" in torch.split()
    assert any("deploy/locks/gpu.txt" in words and ".[gpu,dev]" in words for words in machine.installed)
    assert machine.installed.index(torch) < len(machine.installed) - 1  # before what depends on it


def test_the_build_for_the_cpu_needs_no_compiler(machine: Machine) -> None:
    machine.lacks("gcc")
    (machine.headers / "Python.h").unlink()
    done = machine.set_up(BACKEND="cpu")
    assert done.returncode == 0, done.stderr
    assert "torch==2.13.0+cpu" in machine.installed[1].split()


@pytest.mark.parametrize("compiler", ["cc", "clang"])
def test_what_kernels_need_at_run_time_is_asked_for_before_anything_is_installed(
    compiler: str, machine: Machine
) -> None:
    machine.lacks("gcc")
    done = machine.set_up(BACKEND="gpu")
    assert done.returncode == 1 and not machine.installed
    assert done.stderr.count("\n") == 1 and "no C compiler" in done.stderr and "apt install gcc" in done.stderr
    machine.has(compiler)
    (machine.headers / "Python.h").unlink()
    done = machine.set_up(BACKEND="gpu")
    assert done.returncode == 1 and not machine.installed
    assert done.stderr.count("\n") == 1 and "Python.h" in done.stderr and "apt install python3-dev" in done.stderr


def test_an_environment_that_was_made_for_another_build_is_made_anew(machine: Machine) -> None:
    for made_for, asked, anew in (("gpu", "cpu", True), ("cpu", "cpu", False), ("cpu", "gpu", True)):
        shutil.rmtree(machine.venv, ignore_errors=True)
        machine.set_up(BACKEND=made_for)
        (machine.venv / "made-for").write_text(f"{made_for}\n")
        done = machine.set_up(BACKEND=asked)
        assert done.returncode == 0 and machine.made_venv is anew
        assert (f"was made for {made_for}, making it anew for {asked}" in done.stdout) is anew


def test_without_a_wish_an_environment_stays_what_it_is(machine: Machine) -> None:
    """On a machine with a GPU, after BACKEND=cpu."""
    machine.has("nvidia-smi")
    machine.set_up(BACKEND="cpu")
    (machine.venv / "made-for").write_text("cpu\n")
    assert machine.set_up().returncode == 0
    assert not machine.made_venv and any("cpu.txt" in words for words in machine.installed)
    shutil.rmtree(machine.venv)
    machine.set_up()
    assert any("gpu.txt" in words for words in machine.installed)


@pytest.mark.parametrize(
    ("version", "is_old"), [("550.54.14", True), ("580.65", True), (NEEDED_DRIVER, False), ("1000.1", False)]
)
def test_a_driver_that_is_too_old_is_said_before_gigabytes_are_loaded(
    version: str, is_old: bool, machine: Machine, tmp_path: Path
) -> None:
    machine.has("nvidia-smi")
    driver = tmp_path / "version"
    driver.write_text(
        f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Thu Feb 22 01:44:30 UTC 2024\nGCC version: 12\n"
    )
    done = machine.set_up(DRIVER_FILE=str(driver))
    assert (done.returncode == 1) is is_old and (machine.installed == []) is is_old
    assert (f"driver {version} is older than {NEEDED_DRIVER}" in done.stderr) is is_old
    for backend, is_told in (("gpu", is_old), ("cpu", False)):  # for an image's sake, and on the CPU
        done = machine.set_up(DRIVER_FILE=str(driver), BACKEND=backend)
        assert done.returncode == 0 and (f"{version} of this machine is older" in done.stdout) is is_told


def test_another_backend_is_refused(machine: Machine) -> None:
    done = machine.set_up(BACKEND="tpu")
    assert done.returncode == 1 and done.stderr == "setup: BACKEND=tpu is neither cpu nor gpu\n"


def test_make_sets_up_again_where_another_build_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "deploy" / "locks").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "deploy/setup.sh", "deploy/locks/cpu.txt", "deploy/locks/gpu.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    for stamp, arguments, environment, expected in (
        ("gpu", ["BACKEND=cpu"], {}, True),
        ("gpu", [], {"BACKEND": "cpu"}, True),
        ("", ["BACKEND=cpu"], {}, True),
        ("cpu", ["BACKEND=cpu"], {}, False),
        ("cpu", [], {}, False),
    ):
        (tmp_path / ".venv" / ".set-up").write_text(f"{stamp}\n")
        command = ["make", "--dry-run", "train", *arguments]
        variables = {k: v for k, v in os.environ.items() if k not in ("BACKEND", "MAKEFLAGS")} | environment
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
        assert ("deploy/setup.sh" in done.stdout) is expected, (stamp, arguments, environment)
        assert "distillserve up deploy/runs/tiny.toml" in done.stdout


def test_an_environment_whose_making_was_interrupted_is_made_anew(machine: Machine) -> None:
    """A Ctrl-C before pip is in it."""
    machine.set_up(BACKEND="cpu")
    (machine.venv / "no-pip").touch()
    assert machine.set_up(BACKEND="cpu").returncode == 0 and machine.made_venv
    assert machine.set_up(BACKEND="cpu").returncode == 0 and not machine.made_venv
