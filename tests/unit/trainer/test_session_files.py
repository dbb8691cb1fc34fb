"""The files of a run are read within what its student takes."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.config import RunConfig
from services.errors import ConfigError, DataError
from tests.models import save_model
from trainer.attach import preflight
from trainer.open_session import _assemble, _read_rows
from trainer.tiny.pair import build_tokenizer
from trainer.user_objects import UserObjects


@pytest.mark.parametrize("option", ["path", "eval_path", "lm_path"])
def test_an_id_beyond_the_students_embedding_is_found_in_every_file(option: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json.dumps({"prompt": "p", "text": "t"}))
    bad.write_text(json.dumps({"prompt": "p<|user|>", "text": "t<|user|>"}))  # token id 259
    student = {"model": save_model(tmp_path / "small", "qwen3", vocab_size=259)}
    data = {"path": str(good), "eval_path": str(good), "lm_path": str(good)}
    assert _read_rows(config_of(student, data), build_tokenizer(), [256])[0].parts[0].prompts
    with pytest.raises(DataError, match=r"bad\.jsonl, row 1: .*token id 259, beyond the 259 rows"):
        _read_rows(config_of(student, {**data, option: str(bad)}), build_tokenizer(), [256])


@pytest.mark.parametrize("option", ["path", "eval_path"])
def test_a_prompt_is_bounded_by_the_students_positions(
    option: str, tmp_path: Path, tiny_model_folder: Callable[[str], str]
) -> None:
    good, long = tmp_path / "good.jsonl", tmp_path / "long.jsonl"
    good.write_text(json.dumps({"prompt": "p", "text": "t"}))
    long.write_text(json.dumps({"prompt": "p" * 3329}))  # 256 positions, tokens of 13 characters
    data = {"path": str(good), "eval_path": str(good), "lm_path": str(good), option: str(long)}
    with pytest.raises(DataError, match=r"long\.jsonl, row 1: the prompt has 3329 characters, at most 3328"):
        _read_rows(config_of({"model": tiny_model_folder("qwen3")}, data), build_tokenizer(), [256])


def test_answers_are_bounded_by_the_longest_completion_of_the_evaluation(
    tmp_path: Path, tiny_model_folder: Callable[[str], str]
) -> None:
    """Where they are used: those of the rows to train on are not."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": "a" * 100, "text": "t"}))
    student, good = {"model": tiny_model_folder("qwen3")}, {"path": str(path), "lm_path": str(path)}
    evaluated = config_of(student, {**good, "eval_path": str(path)})
    assert _read_rows(config_of(student, good), build_tokenizer(), [256])[1] is None
    assert _read_rows(evaluated, build_tokenizer(), [256])[1] is not None
    short = evaluated.model_copy(update={"evaluation": evaluated.evaluation.model_copy(update={"max_new_tokens": 100})})
    with pytest.raises(
        DataError, match=r"rows\.jsonl, row 1: the answer and its end are 101 tokens, more than the 100"
    ):
        _read_rows(short, build_tokenizer(), [256])


def test_rows_of_a_stream_are_said_to_be_that(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def fitting(room: int, *, is_stream: bool) -> list[None]:
        asked.append(is_stream)
        return []

    monkeypatch.setattr(preflight, "max_model_len", lambda *_: 99)
    config = RunConfig(pipeline={"epochs": 1}, optimizer={"warmup_steps": 9})  # longer than the run: it ends here
    inputs: Any = SimpleNamespace(
        config=config, record=None, ranks=None, checkpoint=None, prompts=SimpleNamespace(fitting=fitting)
    )
    servers: Any = SimpleNamespace(rollouts=[], teachers=None)
    rest: Any = (None, None, None, None, None)
    for is_stream in (False, True):
        with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps = 9 is above the 1 steps"):
            _assemble(inputs, servers, UserObjects(is_stream=is_stream), *rest)
    assert asked == [False, True]


def config_of(student: dict[str, str], data: dict[str, str]) -> RunConfig:
    return RunConfig(student=student, data=data, loss={"alpha_lm": 0.1})  # type: ignore[arg-type]
