"""The shipped prompts: readable, apart, answered right, and what their script writes."""

import json
import re
import runpy
from pathlib import Path

from services.config import DataConfig
from tests.unit.deploy.stack import CLONE
from trainer.data.prompts import read_prompts
from trainer.tiny.pair import build_tokenizer

FOLDER = CLONE / "deploy" / "data"
NAMES = ("train", "held-out")


def texts(name: str) -> list[str]:
    return [json.loads(line)["messages"][0]["content"] for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def test_every_row_is_a_prompt_and_most_have_an_answer() -> None:
    for name, number in zip(NAMES, (480, 120), strict=True):
        path = str(FOLDER / f"{name}.jsonl")
        prompts = read_prompts(path, DataConfig(path=path), build_tokenizer()).prompts
        answers = [prompt.answer for prompt in prompts if prompt.answer is not None]
        assert len(prompts) == number and len(answers) == number * 3 // 4
        assert all(re.fullmatch(r"-?\d+", answer) for answer in answers)


def test_no_prompt_is_there_twice() -> None:
    everything = texts("train") + texts("held-out")
    assert len(set(everything)) == len(everything)


def test_answers_are_right() -> None:
    checked = 0
    for name in NAMES:
        for line in (FOLDER / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if match := re.match(r"What is (\d+) \* (\d+) - (\d+) \+ (\d+) \* (\d+)\?", row["messages"][0]["content"]):
                a, b, c, d, e = map(int, match.groups())
                assert int(row["answer"]) == a * b - c + d * e
                checked += 1
            if match := re.match(r"A coat costs (\d+) euros and is now (\d+) percent", row["messages"][0]["content"]):
                price, off = map(int, match.groups())
                assert int(row["answer"]) * 100 == price * (100 - off)
                checked += 1
    assert checked > 50


def test_the_files_are_what_their_script_writes(tmp_path: Path) -> None:
    runpy.run_path(str(FOLDER / "make_prompts.py"))["main"](tmp_path)
    for name in NAMES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes()
