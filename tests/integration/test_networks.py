"""Real processes where the environment names proxies, and on addresses of either family."""

import os
import subprocess
from pathlib import Path

import httpx
import pytest

from services.clients import BlockingTeacherClient
from tests.integration.processes import KEY, Server, command, environment, server
from tests.loopbacks import available_loopbacks

pytestmark = pytest.mark.integration

NONSENSE = {"HTTP_PROXY": "http://[nonsense", "ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": "[::1"}
NONSENSE |= {name.lower(): value for name, value in NONSENSE.items()}


def test_the_command_line_reaches_a_teacher_whatever_the_environment_says_of_proxies(teacher_server: Server) -> None:
    done = subprocess.run(
        command("score", "2+2=", "4", "--url", teacher_server.url),
        env={**environment(), **NONSENSE},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("host", available_loopbacks())
def test_a_teacher_listens_on_an_address_of_either_family(host: str, models: dict[str, str], tmp_path: Path) -> None:
    with server("teacher", tmp_path / "log", "--teacher.model", models["qwen3"], host=host) as running:
        with BlockingTeacherClient([running.url], key=KEY) as client:
            client.wait_ready(60.0)
            assert len(client.score([([5, 6, 7], 1)], top_k=3).token_logprobs) == 2
        assert httpx.get(f"{running.url}/health", trust_env=False).is_success


@pytest.mark.long
@pytest.mark.parametrize("host", available_loopbacks()[-1:])
def test_up_runs_on_an_address_of_either_family_among_nonsensical_proxies(
    host: str, models: dict[str, str], tmp_path: Path
) -> None:
    """All three roles, a push of weights among them."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2+2="}\n' * 4)
    words = ["up", "--student.model", models["qwen3"], "--teacher.model", models["qwen3"], "--data.path", str(rows)]
    words += ["--rollout.host", host, "--teacher.host", f"[{host}]" if ":" in host else host]
    words += ["--weight_sync.master_address", host, "--pipeline.steps", "1", "--pipeline.prompts_per_step", "2"]
    words += ["--rollout.max_model_len", "64", "--sampling.max_new_tokens", "8", "--loss.top_k", "8"]
    words += ["--output.dir", str(tmp_path / "out"), "--output.trackers", "[]"]
    done = subprocess.run(command(*words), env={**os.environ, **NONSENSE}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert (tmp_path / "out" / "student" / "config.json").is_file()
