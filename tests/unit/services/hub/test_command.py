"""`distillserve push` on the command line: its help, the commands of its page, and what --dry-run shows."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from services.cli import main
from services.hub.command import EXAMPLES
from services.hub.push import push_to_hub
from tests.hub import TOKEN, Hub
from tests.unit.services.hub.finished_runs import finished_run

PAGE = (Path(__file__).parents[4] / "docs" / "push.md").read_text()


def commands(text: str) -> list[str]:
    return re.findall(r"^ *(distillserve push .*)$", text, re.MULTILINE)


@pytest.fixture
def outputs(tiny_model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder outputs/run of the examples, with a checkpoint and an adapter."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model_folder("qwen3")
    run = finished_run(tmp_path / "outputs" / "run", model, checkpoints={200: model})
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(run / "student" / "adapter")
    return run


@pytest.mark.parametrize("command", [*commands(EXAMPLES), *commands(PAGE)])
def test_the_commands_of_help_and_page_work(
    command: str, outputs: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)[1:]
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    if "--dry-run" in words:
        assert hub.asked == [] and "base_model: Qwen/Qwen3-0.6B" in said.out
    else:
        weights = "adapter_model.safetensors" if "adapter" in words else "model.safetensors"
        repo, branch = words[words.index("--repo") + 1], "v1" if "v1" in words else "main"
        assert weights in hub.files(repo, branch) and said.out.splitlines()[-1].startswith(f"{hub.url}/{repo}/commit/")


def test_the_python_of_the_page_works(outputs: Path, hub: Hub) -> None:
    (code,) = [part for part in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "push_to_hub" in part]
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["push_to_hub"] is push_to_hub and found["url"].startswith(hub.url)
    assert "model.safetensors" in hub.files("me/my-student")


def test_help_shows_every_option_with_examples_and_none_for_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["push", "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in said and "HF_ENDPOINT" in said and "--token" not in said
    documented = set(re.findall(r"^\| `(--[a-z-]+)", PAGE, re.MULTILINE))
    assert documented == set(re.findall(r"^  (--[a-z-]+)", said, re.MULTILINE)) - {"--repo", "--help"}


def test_a_dry_run_counts_what_a_push_sends(outputs: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--dtype", "bfloat16"], ["--what", "adapter"]):
        with pytest.raises(SystemExit):
            main(["push", str(outputs), "--repo", "me/student", *words, "--dry-run"])
        shown = {
            line.split()[1]: int(line.split()[0].replace(",", ""))
            for line in capsys.readouterr().out.split("\n\n")[0].splitlines()
        }
        hub.repos.clear()
        with pytest.raises(SystemExit):
            main(["push", str(outputs), "--repo", "me/student", *words])
        capsys.readouterr()
        sent = {name: len(content) for name, content in hub.files("me/student").items()}
        assert sent.keys() == shown.keys()
        for name, size in sent.items():  # a file that is made has a header as well
            assert 0 <= size - shown[name] < (5000 if words[:1] == ["--dtype"] and name.endswith("safetensors") else 1)
    assert TOKEN not in str(hub.repos)
