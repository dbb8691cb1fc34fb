"""What the student takes of a text is told by its configuration and the run's options."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import BloomConfig

from services.config import RunConfig
from services.errors import StartupError
from trainer.data.text_limits import TextLimits


@pytest.mark.parametrize(("max_model_len", "expected"), [(None, 256), (100, 100), (300, 256)])
def test_the_least_known_limit_counts(
    max_model_len: int | None, expected: int, tiny_model_folder: Callable[[str], str]
) -> None:
    student = {"model": tiny_model_folder("qwen3")}
    sampling = {"max_new_tokens": 10}
    config = RunConfig(student=student, rollout={"max_model_len": max_model_len}, sampling=sampling)  # type: ignore[arg-type]
    assert TextLimits.of(config) == TextLimits(max_tokens=expected, vocab_size=261)


def test_a_model_without_a_longest_sequence_has_no_limit(tmp_path: Path) -> None:
    BloomConfig(vocab_size=99).save_pretrained(tmp_path)
    assert TextLimits.of(RunConfig(student={"model": str(tmp_path)})) == TextLimits(None, 99)  # type: ignore[arg-type]


def test_a_student_without_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no model folder \(no config\.json there\)"):
        TextLimits.of(RunConfig(student={"model": str(tmp_path)}))  # type: ignore[arg-type]


def test_a_lower_limit_lowers_it() -> None:
    assert TextLimits(5, 9).at_most(3) == TextLimits(3, 9)
    assert TextLimits(5, 9).at_most(7) == TextLimits(5, 9).at_most(None) == TextLimits(5, 9)
    assert TextLimits(None, 9).at_most(7) == TextLimits(7, 9)
