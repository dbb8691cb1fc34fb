"""Reward functions of a program as names that other processes can import."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from services.errors import ConfigError
from trainer.reward_names import reward_names
from trainer.rewards.functions import RewardFunction


def by_length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


class Rewards:
    @staticmethod
    def of_a_class(completions: list[str], **_: Any) -> list[float]:
        return [1.0 for _ in completions]

    def bound(self) -> None: ...


another_name = lambda **_: [1.0]  # noqa: E731


def test_names_stay_what_they_are(tmp_path: Path) -> None:
    assert reward_names(["json:dumps", Path("a/b")], tmp_path) == ["json:dumps", "a/b"]


@pytest.mark.parametrize("function", [by_length, Rewards.of_a_class])
def test_a_function_of_a_module_is_imported_by_its_name(function: Any, tmp_path: Path) -> None:
    (name,) = reward_names([function], tmp_path)
    module, _, qualname = name.partition(":")
    assert RewardFunction.load(module, qualname).function is function


def test_a_function_of_a_script_and_of_a_file_beside_it_is_named_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("def g(completions): return [0.0]\n")
    script = (
        "from pathlib import Path\nfrom beside import g\nfrom trainer.reward_names import reward_names\n"
        "def f(completions): return [0.0]\nprint(reward_names([f, g], Path('.')))\n"
    )
    (tmp_path / "script.py").write_text(script)
    root = Path(__file__).parents[3]
    said = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines()[-1] == str([f"{tmp_path / 'script.py'}:f", f"{tmp_path / 'beside.py'}:g"])
    assert RewardFunction.load(str(tmp_path / "beside.py"), "g").required == ["completions"]


def local() -> Any:
    def inner(**_: Any) -> list[float]:
        return [1.0]

    return inner


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (local(), r"reward_functions\[0\] = local\.<locals>\.inner cannot be imported"),
        (another_name, r"= <lambda> cannot be imported"),
        (functools.partial(by_length), "is a partial; give a function"),
        (Rewards().bound, "is a method; give a function"),
        (3, "is a int"),
        (Rewards, "is a type"),
    ],
)
def test_what_another_process_could_not_import_is_refused(source: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        reward_names([source], tmp_path)


def test_a_function_of_no_file_is_refused(tmp_path: Path) -> None:
    code = "from pathlib import Path\nfrom trainer.reward_names import reward_names\ndef f(): pass\nreward_names([f], Path('.'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert "ConfigError: reward_functions[0] = f is defined in no file" in said.stderr.splitlines()[-1]


def test_a_model_is_saved_and_named_by_its_folder(tiny_model_folder: Any, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder("llama"), num_labels=1)
    (name,) = reward_names([model], tmp_path / "models")
    assert name == str(tmp_path / "models" / "reward-0")
    assert AutoModelForSequenceClassification.from_pretrained(name).config.num_labels == 1
