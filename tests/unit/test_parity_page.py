"""docs/parity.md: each field of TRL's trainers has a row, and the options and tests in the rows exist."""

import argparse
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers

import trainer
from services.config import RunConfig
from services.hub.command import add_push_options
from tests.unit import trl_fields

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parity.md").read_text()

# Parts of the project whose names the page has; each is whole where its file is there.
_PARTS = {
    "reward": "services/config/reward_checks.py",
    "lora": "services/config/lora_checks.py",
    "data": "services/config/data_checks.py",
    "python": "trainer/distillation_trainer.py",
}
IS_WHOLE = all((ROOT / path).exists() for path in _PARTS.values())


def rows(title: str) -> dict[str, tuple[str, str]]:
    """Of a section's table: what is here, and test or reason, by TRL's name."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    found = {name.strip("`"): (here, proof) for name, here, proof in lines}
    assert len(found) == len(lines)
    return found


EXPECTED = {
    "MiniLLMTrainer": [*trl_fields.MINILLM_TRAINER, *trl_fields.METHODS],
    "MiniLLMConfig": trl_fields.MINILLM_CONFIG,
    "GKDConfig": trl_fields.GKD_CONFIG,
    "What GRPOConfig adds": trl_fields.GRPO_CONFIG,
    "TrainingArguments": [field.name for field in fields(transformers.TrainingArguments)],
}
ROWS = {(title, name): row for title in EXPECTED for name, row in rows(title).items()}


@pytest.mark.parametrize("title", EXPECTED)
def test_each_field_has_one_row(title: str) -> None:
    assert sorted(rows(title)) == sorted(EXPECTED[title])


def quoted(pattern: str) -> set[str]:
    """What stands in code spans of the tables and is all of a pattern."""
    text = " ".join(part for row in ROWS.values() for part in row)
    return {span for span in re.findall(r"`([^`]+)`", text) if re.fullmatch(pattern, span)}


def option_exists(name: str) -> bool:
    section, _, option = name.partition(".")
    kind: Any = RunConfig.model_fields[section].annotation if section in RunConfig.model_fields else None
    return kind is not None and option in kind.model_fields


def is_elsewhere(name: str) -> bool:
    """Of a part that is not there, or was there before with fewer options."""
    return not IS_WHOLE and name.split(".")[0] in ("reward", "lora", "data", "loss")


def test_every_option_exists() -> None:
    named = {name for name in quoted(r"[a-z_]+\.[a-z_]+") if not name.endswith((".json", ".jsonl"))}
    assert len(named) > 60 and {"loss.gamma", "student.model", "output.dir"} <= named
    assert [name for name in sorted(named) if not option_exists(name) and not is_elsewhere(name)] == []


def test_every_test_exists() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^(?:async )?def (test_\w+)", sources, re.MULTILINE))
    named = quoted(r"test_\w+")
    assert len(named) > 70
    if IS_WHOLE:
        assert named - defined == set()
    assert len(named & defined) > 50


def test_what_is_here_has_a_test_and_what_is_not_has_a_reason() -> None:
    for (title, name), (here, proof) in ROWS.items():
        words = re.sub(r"`test_\w+`", "", proof).strip(" ,;:")
        assert words if here == "none" else "`test_" in proof, f"{title}: {name}"
        assert here == "none" or "`" in here, f"{title}: {name}"


def test_nothing_is_put_off() -> None:
    assert not re.search(r"(?i)\b(planned|todo|not yet|will be|later version|future|coming|soon)\b", PAGE)


def test_the_options_of_a_push_and_the_arguments_in_python_exist() -> None:
    parser = argparse.ArgumentParser()
    add_push_options(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    pushed = {span.removeprefix("distillserve push ") for span in quoted(r"distillserve push --.*")}
    assert pushed and pushed <= flags
    arguments = {span[len("DistillationTrainer(") : -2] for span in quoted(r"DistillationTrainer\(\w+=\)")}
    assert {"student", "teacher", "callbacks"} <= arguments
    if (ROOT / _PARTS["python"]).exists():
        assert arguments <= set(inspect.signature(trainer.DistillationTrainer).parameters)
        for method in quoted(r"DistillationTrainer\.\w+"):
            assert hasattr(trainer.DistillationTrainer, method.split(".")[1])


def test_the_page_names_the_versions_it_was_read_from() -> None:
    installed = ".".join(transformers.__version__.split(".")[:2])
    assert "1.14.2" in PAGE and "1.16.0" in PAGE and f"transformers {installed}" in PAGE
