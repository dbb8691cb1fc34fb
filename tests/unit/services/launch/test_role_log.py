"""The logs of a run's processes: one for each start, never written over, gone when a run begins anew."""

from pathlib import Path

import pytest

from services.errors import OutputError
from services.launch.role_log import RoleLog, forget_logs, next_log


def test_every_start_has_a_log_of_its_own(tmp_path: Path) -> None:
    names = []
    for number in range(3):
        log = RoleLog(tmp_path / "logs" / "trainer-1.log")
        log.add(f"start {number}")
        log.close()
        names.append(log.path.name)
    assert names == ["trainer-1.log", "trainer-1.2.log", "trainer-1.3.log"]
    assert [(tmp_path / "logs" / name).read_text() for name in names] == ["start 0\n", "start 1\n", "start 2\n"]


def test_a_name_that_is_free_between_others_is_taken(tmp_path: Path) -> None:
    (tmp_path / "rollout.log").touch()
    (tmp_path / "rollout.3.log").touch()
    assert next_log(tmp_path / "rollout.log").name == "rollout.2.log"


def test_a_run_that_begins_anew_forgets_the_logs_of_roles_alone(tmp_path: Path) -> None:
    ours = ["rollout.log", "rollout-2.log", "rollout-2.3.log", "teacher.12.log", "trainer.log", "trainer-7.log"]
    others = ["rollout.log.gz", "notes.log", "rollout.old.log", "my-trainer.log", "trainer.txt"]
    for name in ours + others:
        (tmp_path / name).touch()
    forget_logs(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    forget_logs(tmp_path / "missing")


def test_a_log_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(OutputError, match=r"logs/rollout\.log cannot be written: .*free some space"):
        RoleLog(tmp_path / "logs" / "rollout.log")
