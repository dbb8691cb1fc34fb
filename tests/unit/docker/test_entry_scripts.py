"""The shell scripts that stand before a role's command."""

import os
import subprocess
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[3] / "docker"


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(DOCKER / script), *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_root_becomes_the_owner_of_the_folder_without_privileges(tmp_path: Path) -> None:
    stand_in(tmp_path, "id", "echo 0")
    stand_in(tmp_path, "stat", 'case "$2" in %u) echo 1234;; %g) echo 4321;; esac')
    stand_in(tmp_path, "setpriv", 'printf "%s|" "$@"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("as-owner.sh", "distillserve", "train", "a b", PATH=path, RUN_AS_OWNER_OF="/cache")
    words = done.stdout.split("|")
    assert {"--reuid=1234", "--regid=4321", "--clear-groups", "--bounding-set=-all", "--no-new-privs"} <= set(words)
    assert words[-4:] == ["distillserve", "train", "a b", ""]


@pytest.mark.parametrize(("user", "folder"), [("1000", "/cache"), ("0", "")])
def test_anybody_else_stays_who_they_are(user: str, folder: str, tmp_path: Path) -> None:
    stand_in(tmp_path, "id", f"echo {user}")
    stand_in(tmp_path, "setpriv", "echo changed")
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert run("as-owner.sh", "echo", "a  b", PATH=path, RUN_AS_OWNER_OF=folder).stdout == "a  b\n"


def test_success_leaves_a_sign_and_failure_none(tmp_path: Path) -> None:
    """/tmp is the container's own there; here the commands that touch it are stood in for."""
    sign = tmp_path / "finished"
    stand_in(tmp_path, "rm", f'[ "$2" = /tmp/finished ] && exec /bin/rm -f {sign}')
    stand_in(tmp_path, "touch", f'[ "$1" = /tmp/finished ] && : > {sign}')
    stand_in(tmp_path, "sleep", 'echo "asleep $1"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("once.sh", "echo", "a  b", PATH=path)
    assert (done.returncode, done.stdout, sign.exists()) == (0, "a  b\nasleep infinity\n", True)
    done = run("once.sh", "sh", "-c", "exit 3", PATH=path)
    assert (done.returncode, done.stdout, sign.exists()) == (3, "", False)
