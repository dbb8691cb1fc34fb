"""Forward passes from whatever is queued: company, order, failures, callers that leave. The engine is a recorder."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest

from services.errors import RequestError
from services.http.metrics import TeacherMetrics
from services.teacher.jobs import EncodedSequence, ScoreItem, ScoreJob
from services.teacher.transformers.batcher import Batcher
from tests.servers import teacher_info
from trainer.tiny.pair import build_tokenizer

INFO = teacher_info(build_tokenizer())


class Recorder:
    """Every row's logprob is the last token of its sequence (`job`); keeps the lengths of each forward pass."""

    def __init__(self, parallel_forwards: int = 1) -> None:
        self.info, self.parallel_forwards = INFO, parallel_forwards
        self.passes: list[list[int]] = []
        self.free = threading.Event()
        self.entered = threading.Semaphore(0)
        self.fails: Callable[[list[ScoreItem]], bool] = lambda items: False

    def forward(self, items: list[ScoreItem]) -> None:
        self.entered.release()
        self.free.wait()
        self.passes.append([len(item.sequence.token_ids) for item in items])
        if self.fails(items):
            raise IndexError("a bug")
        for item in items:
            item.job.columns.token_logprobs[item.rows] = item.sequence.token_ids[-1]


def job(*lengths: int, mark: int = 0) -> ScoreJob:
    """Sequences that end in 100 times the mark plus their place in the job."""
    sequences = [EncodedSequence([0] * (n - 1) + [100 * mark + place], 1) for place, n in enumerate(lengths)]
    return ScoreJob(sequences, top_k=1, temperature=1.0)


def mark_of(item: ScoreItem) -> int:
    return item.sequence.token_ids[-1] // 100


@contextmanager
def batching(
    limit: int = 40, parallel_forwards: int = 1
) -> Iterator[tuple[Batcher, Recorder, list[Exception], TeacherMetrics]]:
    engine, failures, metrics = Recorder(parallel_forwards), [], TeacherMetrics()
    batcher = Batcher(engine, limit, metrics, failures.append)
    try:
        yield batcher, engine, failures, metrics
    finally:
        engine.free.set()
        batcher.close()


def hold_with(batcher: Batcher, engine: Recorder, first: ScoreJob) -> None:
    """Submit a job and return once its forward pass has begun; what is submitted now waits together."""
    batcher.submit(first)
    engine.entered.acquire()


def marks(done: ScoreJob) -> list[float]:
    """The mark in the rows of each sequence, all of which must be its own."""
    scores = done.done.result(5)
    found = []
    for place, (start, end) in enumerate(pairwise(scores.row_offsets)):
        rows = [divmod(value, 100) for value in scores.token_logprobs[start:end].tolist()]
        assert end - start == len(done.sequences[place].token_ids) - 1 and set(rows) == {(rows[0][0], place)}
        found.append(rows[0][0])
    return found


def test_what_waits_goes_together_sorted_by_length_and_finds_its_way_back() -> None:
    with batching() as (batcher, engine, _, metrics):
        hold_with(batcher, engine, job(5, mark=1))
        waiting = [job(10, 3, mark=2), job(4, mark=3), job(9, 10, mark=4)]
        for each in waiting:
            batcher.submit(each)
        engine.free.set()
        assert [marks(each) for each in waiting] == [[2, 2], [3], [4, 4]]
    # the oldest, of ten, goes first; four beside it would be 40 padded tokens too, but mostly padding
    assert engine.passes == [[5], [10, 9, 10], [3, 4]]
    assert metrics.queued_sequences._value.get() == 0


def test_the_oldest_sequence_is_always_in_the_next_pass() -> None:
    with batching(limit=10) as (batcher, engine, _, _):
        hold_with(batcher, engine, job(2))
        short = job(2, mark=1)
        batcher.submit(short)
        for _ in range(8):  # longer ones come first in a sorted window
            batcher.submit(job(9))
        engine.free.set()
        assert marks(short) == [1]
    assert engine.passes[:2] == [[2], [2]]


def test_a_job_larger_than_a_pass_takes_several_and_one_longer_than_a_pass_goes_alone() -> None:
    with batching(limit=10) as (batcher, engine, _, _):
        engine.free.set()
        large = job(4, 4, 4, 4, 25, mark=7)
        batcher.submit(large)
        assert marks(large) == [7] * 5
    assert sorted(engine.passes) == [[4, 4], [4, 4], [25]]


def test_a_request_does_not_fail_for_its_company() -> None:
    with batching() as (batcher, engine, failures, _):
        engine.fails = lambda items: any(mark_of(item) == 13 for item in items)
        hold_with(batcher, engine, job(5))
        good, bad, other = job(4, 4, mark=1), job(4, mark=13), job(4, mark=2)
        for each in (good, bad, other):
            batcher.submit(each)
        engine.free.set()
        assert (marks(good), marks(other)) == ([1, 1], [2])
        with pytest.raises(IndexError):
            bad.done.result(5)
    assert failures == []


def test_an_engine_that_stays_broken_fails_what_waits_and_takes_no_more() -> None:
    with batching(limit=4) as (batcher, engine, failures, _):
        engine.fails = lambda items: True
        hold_with(batcher, engine, job(4))
        waiting = [job(4), job(4)]
        for each in waiting:
            batcher.submit(each)
        engine.free.set()
        errors = [each.done.exception(5) for each in waiting]
        late = job(2)
        batcher.submit(late)
        assert isinstance(late.done.exception(5), RequestError)
    assert [type(e) for e in failures] == [IndexError]
    assert [getattr(e, "status", None) for e in errors] == [503, 503]
    assert len(engine.passes) == 2  # the pass that failed, and the probe


def test_a_failure_of_the_queue_itself_is_told_to_all_and_ends_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    with batching() as (batcher, engine, failures, _):
        hold_with(batcher, engine, first := job(5))
        batcher.submit(waiting := job(6))
        monkeypatch.setattr(batcher, "_measure", lambda items, seconds: 1 / 0)
        engine.free.set()
        for each in (first, waiting):
            with pytest.raises(RequestError, match=r"the engine failed \(ZeroDivisionError\)"):
                each.done.result(5)
    assert [type(error) for error in failures] == [ZeroDivisionError]


def test_a_job_whose_caller_is_gone_leaves_the_queue() -> None:
    with batching(limit=4) as (batcher, engine, _, _):
        hold_with(batcher, engine, job(4, 4, 4, mark=1))
        gone, stays = job(4, 4), job(4, mark=2)
        batcher.submit(gone)
        batcher.submit(stays)
        assert gone.done.cancel()
        engine.free.set()
        assert marks(stays) == [2]
        assert len(engine.passes) == 4
        assert batcher._queued_tokens == 0 and not batcher._submitted


def test_to_drop_thousands_whose_caller_is_gone_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for each in the window would compare it with all before: half a minute for 16000 behind as many others."""
    compared: list[ScoreItem] = []
    monkeypatch.setattr(ScoreItem, "__eq__", lambda item, other: compared.append(item) or item is other)
    with batching(limit=100) as (batcher, engine, _, _):
        hold_with(batcher, engine, job(5))
        staying, leaving = job(*[2] * 20, mark=1), job(*[2] * 20)
        for each in (staying, leaving):
            batcher.submit(each)
        leaving.done.cancel()
        engine.free.set()
        assert marks(staying) == [1] * 20
    assert engine.passes == [[5], [2] * 20] and compared == []


def test_closing_finishes_what_was_accepted() -> None:
    engine, metrics = Recorder(), TeacherMetrics()
    batcher = Batcher(engine, 4, metrics, lambda error: None)
    jobs = [job(4, mark=index) for index in range(5)]
    for each in jobs:
        batcher.submit(each)
    engine.free.set()
    batcher.close()
    assert all(each.done.done() for each in jobs)
    assert [marks(each) for each in jobs] == [[0], [1], [2], [3], [4]]


def test_the_backlog_is_an_estimate_in_seconds() -> None:
    with batching(limit=100) as (batcher, engine, _, metrics):
        engine.free.set()
        assert batcher.backlog_s() == 0.0
        first = job(10, 8)
        batcher.submit(first)
        first.done.result(5)
        engine.entered.acquire()
        batcher._tokens_per_s = 20.0
        engine.free.clear()
        hold_with(batcher, engine, job(30))
        batcher.submit(job(10))
        assert batcher.backlog_s() == pytest.approx(2.0)  # 40 tokens, the ones under way included
    assert metrics.batch_fill._sum.get() == pytest.approx(18 / 20 + 1 + 1)


def test_a_queue_of_large_answers_holds_no_memory() -> None:
    large = ScoreJob([EncodedSequence([0] * 1000, 1)], top_k=10_000, temperature=1.0)
    assert "columns" not in vars(large)
    assert large.columns.topk_ids.shape == (999, 10_000)
    assert isinstance(large.columns.topk_ids, np.ndarray)


# ------------------------------------------------------------------------------------ forward passes side by side


def test_forward_passes_run_side_by_side_and_share_a_job() -> None:
    with batching(limit=1000, parallel_forwards=2) as (batcher, engine, _, metrics):
        large = job(*[200] * 6, mark=3)
        batcher.submit(large)
        for _ in range(2):
            assert engine.entered.acquire(timeout=5)  # while the first has not ended
        engine.free.set()
        assert marks(large) == [3] * 6
    assert max(map(len, engine.passes)) == 3  # half of it, for the other thread
    assert metrics.registry.get_sample_value("distillserve_teacher_wait_seconds_count") == 1


def test_little_work_is_not_cut_for_an_idle_thread() -> None:
    with batching(limit=1000, parallel_forwards=2) as (batcher, engine, _, _):
        small = job(*[100] * 2, mark=3)
        batcher.submit(small)
        engine.free.set()
        assert marks(small) == [3] * 2
    assert engine.passes == [[100, 100]]


def test_a_failure_in_one_forward_pass_spares_the_one_beside_it() -> None:
    with batching(limit=300, parallel_forwards=2) as (batcher, engine, failures, _):
        bad, good = job(300, mark=7), job(300, mark=3)
        engine.fails = lambda items: mark_of(items[0]) == 7
        batcher.submit(bad)
        batcher.submit(good)
        engine.free.set()
        assert marks(good) == [3] and isinstance(bad.done.exception(5), IndexError)
        assert not failures


def test_an_engine_that_breaks_in_two_forward_passes_at_once_answers_everybody() -> None:
    with batching(limit=300, parallel_forwards=2) as (batcher, engine, failures, _):
        jobs = [job(300, mark=mark) for mark in range(6)]
        engine.fails = lambda items: True
        for each in jobs:
            batcher.submit(each)
        engine.free.set()
        errors = [each.done.exception(5) for each in jobs]
        assert all(isinstance(error, IndexError | RequestError) for error in errors)
        assert sum(isinstance(error, IndexError) for error in errors) <= 2
    assert failures
