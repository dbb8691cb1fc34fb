"""`distillserve push` as a process of its own, against a hub on loopback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hub import TOKEN, Hub, running_hub
from tests.models import save_model
from tests.unit.services.hub.finished_runs import finished_run

pytestmark = pytest.mark.integration


@pytest.fixture
def hub() -> Iterator[Hub]:
    """One for each test: what a program that was ended has sent may still arrive afterwards."""
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    return finished_run(folder / "run", save_model(folder / "model", "qwen3"))


def start(hub: Hub, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from services.command import main; main()", "push", *arguments]
    home = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {**os.environ, **home, **variables}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def said(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_a_finished_run_is_pushed_and_what_arrives_computes_the_same(run: Path, hub: Hub, tmp_path: Path) -> None:
    code, out, err = said(start(hub, str(run), "--repo", "me/student", "--private", "--revision", "v1"))
    assert code == 0, err
    assert out.splitlines()[0].startswith("uploading 7 files")
    assert out.splitlines()[-1].startswith(f"{hub.url}/me/student/commit/")
    assert "Traceback" not in err and "INFO" not in err
    assert hub.repos["me/student"].private and hub.files("me/student") == {}
    folder = hub.write("me/student", tmp_path, "v1")
    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, run / "student")]
    assert all(torch.equal(models[0][name], weight) for name, weight in models[1].items())


def test_a_dry_run_shows_files_and_card_and_asks_nobody(run: Path, hub: Hub) -> None:
    options = ("--repo", "me/student", "--dtype", "bfloat16", "--dry-run")
    code, out, err = said(start(hub, str(run), *options, HF_TOKEN="", HF_HUB_OFFLINE="1"))
    assert code == 0, err
    assert [line.split()[1] for line in out.split("\n\n")[0].splitlines()] == [
        *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert "base_model: Qwen/Qwen3-0.6B" in out and "`bfloat16`" in out and hub.asked == []


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "expected"),
    [
        (["{run}", "--repo", "me/student"], {"HF_TOKEN": "hf_wrongToken0123456789"}, 4, "answered 401: the token"),
        (["{run}", "--repo", "openai/student"], {}, 4, "answered 403: the token may not write to openai/student"),
        (["{run}", "--repo", "me/student"], {"HF_ENDPOINT": "http://127.0.0.1:1"}, 4, "cannot be reached"),
        (["{run}/absent", "--repo", "me/student"], {}, 2, "is no folder"),
        (["{run}", "--repo", "me/student", "--what", "adapter"], {}, 2, "holds no adapter"),
        (["{run}", "--repo", "me/student", "--commit-message", " "], {}, 2, "--commit-message is empty"),
        (["{run}"], {}, 2, "--repo"),
        (["{run}", "--repo", "me/student", "--token", "x"], {}, 2, "--token is not an option"),
    ],
)
def test_what_goes_wrong_is_one_line_with_an_exit_code(
    arguments: list[str], variables: dict[str, str], code: int, expected: str, run: Path, hub: Hub
) -> None:
    words = [word.format(run=run) for word in arguments]
    ended, out, err = said(start(hub, *words, DISTILLSERVE_LOG_LEVEL="WARNING", **variables))
    assert ended == code and out == "", err
    assert err.startswith("distillserve: ") and err.count("\n") == 1 and expected in err


def test_the_token_is_in_nothing_that_is_said_at_any_log_level(run: Path, hub: Hub) -> None:
    token = "hf_wrongToken0123456789"
    for key in (token, TOKEN):
        _, out, err = said(
            start(hub, str(run), "--repo", "me/student", HF_TOKEN=key, DISTILLSERVE_LOG_LEVEL="DEBUG", HF_DEBUG="1")
        )
        assert key not in out + err and "secret-of-the-address" not in out + err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("silent", ["create", "lfs", "commit"])
def test_a_push_that_is_interrupted_ends_at_once_and_leaves_nothing(
    silent: str, number: signal.Signals, code: int, run: Path, hub: Hub
) -> None:
    before: Any = sorted(path.name for path in run.iterdir())
    hub.faults[silent] = "silent"
    process = start(hub, str(run), "--repo", "me/student", "--dtype", "bfloat16", DISTILLSERVE_LOG_LEVEL="WARNING")
    deadline = time.monotonic() + 60
    while silent not in hub.asked and time.monotonic() < deadline:
        time.sleep(0.02)
    asked = time.monotonic()
    process.send_signal(number)
    ended, _, err = said(process)
    assert ended == code and time.monotonic() - asked < 10
    assert err.splitlines()[-1].startswith("distillserve: ") and "Traceback" not in err
    assert sorted(path.name for path in run.iterdir()) == before
    assert all(set(branch) == {".gitattributes"} for repo in hub.repos.values() for branch in repo.branches.values())
    hub.left.set()
    hub.left.clear()
