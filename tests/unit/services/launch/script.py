"""A script that trains beside servers which are small scripts: what tests of services/launch/started_servers.py start.

    python -m tests.unit.services.launch.script FOLDER CONFIG ROLES ACT

ROLES and ACT are expressions and statements with `folder`, `servers` and `interruption` in scope. As the process that
watches the servers it is started with the first three alone, and the id of its parent.
"""

import sys
import time
from functools import partial
from pathlib import Path

from services.config import RunConfig
from services.launch.script_screen import ScriptScreen
from services.launch.servers_alone import main, serve
from services.launch.started_servers import started_servers
from tests.unit.services.launch.roles import *  # noqa: F403
from tests.unit.services.launch.roles import starts, until

MODULE = [sys.executable, "-m", "tests.unit.services.launch.script"]


def watch(folder: Path, roles: str) -> int:
    sys.argv[1:] = sys.argv[-1:]
    names = globals() | {"folder": folder}
    return main(partial(serve, command=eval(roles, names), grace_s=1.0))


def script(folder: Path, config: RunConfig, roles: str, act: str) -> None:
    import os

    command = [*MODULE, "watch", str(folder), roles]
    with (
        ScriptScreen(Path(config.output.dir) / "metrics.jsonl") as screen,
        started_servers(config, screen, dict(os.environ), command) as servers,
    ):
        (folder / "ready").touch()
        exec(
            act,
            globals()
            | {
                "folder": folder,
                "servers": servers,
                "screen": screen,
                "os": os,
                "time": time,
                "until": until,
                "starts": starts,
            },
        )


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        sys.exit(watch(Path(sys.argv[2]), sys.argv[3]))
    script(Path(sys.argv[1]), RunConfig.model_validate_json(sys.argv[2]), *sys.argv[3:])
