"""No unusable teacher row becomes a number in a loss."""

import json
from pathlib import Path

import numpy as np
import pytest

from services.errors import PeerError
from tests.unit.trainer.test_batch import sample
from trainer.teacher_scores import Quarantine, Quarantined, ScoredSample, defect


def changed(**arrays: np.ndarray) -> ScoredSample:
    return ScoredSample(**{**vars(sample(0, 2, 3)), **arrays})


def with_value(name: str, value: float) -> ScoredSample:
    array = getattr(sample(0, 2, 3), name).copy()
    array.flat[0] = value
    return changed(**{name: array})


def test_a_good_sample_has_no_defect() -> None:
    assert defect(sample(0, 2, 3)) is None


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (with_value("teacher_token_logprobs", np.nan), "not finite"),
        (with_value("teacher_token_logprobs", -np.inf), "not finite"),
        (with_value("teacher_support_logprobs", np.nan), "no finite logprob"),
        (with_value("teacher_support_logprobs", np.inf), "no finite logprob"),
        (with_value("teacher_tail_logprobs", np.nan), "no finite logprob"),
        (with_value("teacher_tail_logprobs", -np.inf), "no finite logprob"),
        (with_value("support_ids", int(sample(0, 2, 3).support_ids[0, 1])), "twice in one row"),
        (with_value("teacher_support_logprobs", 0.0), "sum to"),
        (changed(teacher_token_logprobs=np.zeros(2, np.float32)), "scored 2 of 3 tokens"),
    ],
)
def test_unusable_rows_are_named(bad: ScoredSample, reason: str) -> None:
    assert reason in (defect(bad) or "")


def test_quarantined_samples_are_written_and_counted(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", max_rate=0.5)
    bad = Quarantined(sample(7, 2, 3).rollout, "because")
    quarantine.add([], 10)
    assert not (tmp_path / "q.jsonl").exists()
    quarantine.add([bad, bad], 4)
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert quarantine.count == len(rows) == 2
    assert rows[0] == {"row": 7, "reason": "because", "completion": bad.rollout.completion.token_ids.tolist()}


def test_too_many_of_them_stop_the_run(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", max_rate=0.1)
    with pytest.raises(PeerError, match=r"1 of 4 samples.*because.*max_quarantine_rate = 0\.1"):
        quarantine.add([Quarantined(sample(7, 2, 3).rollout, "because")], 4)
    assert (tmp_path / "q.jsonl").read_text().count("\n") == 1
