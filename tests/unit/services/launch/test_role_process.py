"""The process of a role: what is left of a start that is given up."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from services.launch.role_log import RoleLog
from services.launch.role_process import RoleId, RoleProcess


async def test_a_start_that_is_given_up_leaves_no_open_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = asyncio.Event()

    async def hangs(*_: Any, **__: Any) -> None:
        begun.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(asyncio.get_running_loop(), "subprocess_exec", hangs)
    log = RoleLog(tmp_path / "logs" / "rollout.log")
    starting = asyncio.create_task(RoleProcess.start(RoleId("rollout"), ["true"], {}, log, lambda *_: None))
    await begun.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    with pytest.raises(ValueError, match="closed file"):
        log._file.write(b"more")


@pytest.mark.parametrize(
    ("role", "name", "title", "log"),
    [
        (RoleId("rollout"), "rollout", "rollout", "rollout.log"),
        (RoleId("rollout", 1, 2), "rollout 2", "rollout server 2", "rollout-2.log"),
        (RoleId("trainer", 1, 2), "trainer rank 1", "trainer's rank 1", "trainer-1.log"),
    ],
)
def test_what_a_role_is_called(role: RoleId, name: str, title: str, log: str) -> None:
    assert (role.name, role.title, role.log_name) == (name, title, log)
