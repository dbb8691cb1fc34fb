"""The embedded pair: tokenizer, data, cache."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.errors import OutputError
from trainer.tiny.pair import PairRecipe, addition_rows, build_tiny_pair, build_tokenizer, split_rows

SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 1, "intermediate_size": 32, "num_steps": 2, "batch_size": 8}


def recipe() -> PairRecipe:
    default = PairRecipe()
    return replace(
        default,
        teacher=replace(default.teacher, **SMALL),
        student=replace(default.student, **SMALL),
        num_probe_prompts=10,
        min_teacher_exact_match=0.0,
    )


@pytest.mark.parametrize("text", ["47+85=", "naïve — 你好\n\t end ", "", "<|user|>x"])
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.eos_token_id not in ids


def test_answers_are_the_reversed_digits_of_the_sum() -> None:
    rows = addition_rows()
    assert len(rows) == len({row.prompt for row in rows}) == 10_000
    for row in rows:
        a, b = row.prompt.rstrip("=").split("+")
        assert int(row.answer[::-1]) == int(a) + int(b)


def test_held_out_prompts_are_held_out() -> None:
    train, held_out = split_rows(addition_rows(), 1000, seed=3)
    assert len(held_out) == 1000 and not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert len({r.prompt for r in train} | {r.prompt for r in held_out}) == 10_000
    assert split_rows(addition_rows(), 1000, seed=3) == (train, held_out)
    assert split_rows(addition_rows(), 1000, seed=4)[1] != held_out


def test_a_pair_is_built_once_and_again_for_another_seed_or_recipe(tmp_path: Path) -> None:
    said: list[str] = []
    pair = build_tiny_pair(tmp_path, recipe=recipe(), on_progress=said.append)
    assert said and len(pair.eval_data.read_text().splitlines()) == 1000
    for folder in (pair.teacher, pair.student):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.vocab_size == len(tokenizer) and model.generation_config.eos_token_id == 256
    said.clear()
    assert build_tiny_pair(tmp_path, recipe=recipe(), on_progress=said.append) == pair
    assert said == []
    build_tiny_pair(tmp_path, seed=1, recipe=recipe(), on_progress=said.append)
    assert said and json.loads((tmp_path / "pair.json").read_text())["seed"] == 1


def test_a_build_that_was_interrupted_is_done_again(tmp_path: Path) -> None:
    def interrupt(message: str) -> None:
        if message.startswith("student"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_tiny_pair(tmp_path, recipe=recipe(), on_progress=interrupt)
    assert not (tmp_path / "pair.json").exists()
    said: list[str] = []
    build_tiny_pair(tmp_path, recipe=recipe(), on_progress=said.append)
    assert said


def test_a_teacher_that_learned_too_little_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"below min_teacher_exact_match=0\.99"):
        build_tiny_pair(tmp_path, recipe=replace(recipe(), min_teacher_exact_match=0.99), on_progress=lambda _: None)


def test_a_disk_that_is_full_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"^--output = .* cannot be written: .*No space left on device; free some"):
        build_tiny_pair(tmp_path, recipe=recipe(), on_progress=lambda _: None)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "teacher" / "model.safetensors").mkdir(parents=True)  # safetensors has errors of its own
    with pytest.raises(OutputError, match=r"^--output = .* cannot be written"):
        build_tiny_pair(tmp_path, recipe=recipe(), on_progress=lambda _: None)
