"""Forward passes from whatever is queued, across requests; a thread for each that may run at the same time.

consumes   ScoreJobs, in the order of their arrival
produces   their answers, each when its last sequence is scored
waits for  a job, then for the forward pass
unblocked  by `submit`

A window of sequences from the front of the queue is sorted by length and cut into forward passes of similar length; the
one that holds the oldest sequence runs next, so nothing waits for ever and little is padded.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from services.errors import DistillServeError
from services.http.metrics import TeacherMetrics
from services.models.padding import cut_by_padded_tokens
from services.teacher.jobs import EncodedSequence, ScoreItem, ScoreJob, engine_failed, shutting_down
from services.wire.teacher import TeacherInfo

logger = logging.getLogger(__name__)

# Forward passes' worth of sequences that are sorted together.
_WINDOW_FORWARDS = 4
# Tokens that are not split further for threads that have nothing to do: each forward pass has its own overhead.
_WORTH_A_FORWARD = 256
# Padding that a forward pass may have is this part of its most tokens: about what one more costs by itself.
_PADDING_DIVISOR = 32
# Weight of the newest forward pass in the running mean of the speed.
_MEAN_WEIGHT = 0.2


class Engine(Protocol):
    """What the batcher asks of an engine."""

    info: TeacherInfo
    tokenizer: PreTrainedTokenizerBase
    parallel_forwards: int
    """Forward passes that may run at the same time, each called from a thread of its own."""

    def forward(self, items: list[ScoreItem]) -> None:
        """Fill the rows of these sequences in the columns of their jobs."""


class Batcher:
    """The queue in front of an engine, and the threads that empty it.

    Args:
        tokens_per_forward: bound on the padded tokens of a forward pass.
        on_failure: told when the engine does not work any more; nothing is scored after that.
    """

    def __init__(
        self,
        engine: Engine,
        tokens_per_forward: int,
        metrics: TeacherMetrics,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self.engine, self._limit, self._metrics, self._on_failure = engine, tokens_per_forward, metrics, on_failure
        self._most_padding = tokens_per_forward // _PADDING_DIVISOR
        # Guards everything below it.
        self._arrived = threading.Condition()
        self._waiting: deque[ScoreItem] = deque()
        self._window: list[ScoreItem] = []
        self._queued_tokens = 0
        self._tokens_per_s = 0.0
        self._submitted: dict[ScoreJob, float] = {}
        self._closed = False
        names = [f"teacher-engine-{index}" for index in range(engine.parallel_forwards)]
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    @property
    def info(self) -> TeacherInfo:
        return self.engine.info

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.engine.tokenizer

    def submit(self, job: ScoreJob) -> None:
        """Queue a job; its answer, or its error, arrives in `job.done`."""
        with self._arrived:
            if self._closed:
                job.done.set_exception(shutting_down())
                return
            self._waiting.extend(job.items())
            self._queued_tokens += sum(len(s.token_ids) for s in job.sequences)
            self._submitted[job] = time.monotonic()
            self._arrived.notify()

    def backlog_s(self) -> float:
        """Estimate of the time that the queue takes, seconds; 0 before anything was measured."""
        return self._queued_tokens / self._tokens_per_s if self._tokens_per_s else 0.0

    def close(self) -> None:
        """Score what is queued, then end the threads."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        try:
            while items := self._next_forward():
                self._score(items)
        except Exception as error:  # of the queue itself; without this thread nobody would ever be answered
            logger.error("the queue failed", exc_info=error)
            self._give_up(error)

    def _next_forward(self) -> list[ScoreItem]:
        """The sequences of the next forward pass; none when the batcher is closed and empty."""
        with self._arrived:
            while True:
                self._arrived.wait_for(lambda: self._waiting or self._window or self._closed)
                if not self._waiting and not self._window:
                    return []
                self._fill_window()
                if items := self._take():
                    self._begin(items)
                    if self._window or self._waiting:
                        self._arrived.notify()  # another thread, where one is idle
                    return items

    def _fill_window(self) -> None:
        """Top the window up from the queue, and drop what nobody waits for any more."""
        tokens = sum(len(item.sequence.token_ids) for item in self._window)
        while self._waiting and tokens < _WINDOW_FORWARDS * self._limit:
            item = self._waiting.popleft()
            self._window.append(item)
            tokens += len(item.sequence.token_ids)
        window, self._window = self._window, []
        for item in window:
            if item.job.done.done():
                self._forget(item)
            else:
                self._window.append(item)

    def _take(self) -> list[ScoreItem]:
        """A forward pass's worth of the window, or a fair part of less, so that no thread has to look on."""
        lengths = [len(item.sequence.token_ids) for item in self._window]
        limit = self._limit
        if len(self._threads) > 1:
            limit = min(limit, max(_WORTH_A_FORWARD, -(-sum(lengths) // len(self._threads))))
        # The oldest sequence stands first in the window, and decides.
        chosen = set(next((g for g in cut_by_padded_tokens(lengths, limit, self._most_padding) if 0 in g), []))
        items = [item for index, item in enumerate(self._window) if index in chosen]
        self._window = [item for index, item in enumerate(self._window) if index not in chosen]
        self._metrics.queued_sequences.set(len(self._waiting) + len(self._window))
        return items

    def _begin(self, items: list[ScoreItem]) -> None:
        now = time.monotonic()
        for job in dict.fromkeys(item.job for item in items):
            if job.begin():
                self._metrics.wait_seconds.observe(now - self._submitted[job])

    def _forget(self, item: ScoreItem) -> bool:
        """Count a sequence as done, scored or dropped; True when it was the last one of its job."""
        with self._arrived:
            self._queued_tokens -= len(item.sequence.token_ids)
            is_last = item.job.finish(1)
            if is_last:
                self._submitted.pop(item.job, None)
            return is_last

    def _score(self, items: list[ScoreItem]) -> None:
        """One forward pass. If it fails, its jobs are tried one by one: a request must not fail for its company."""
        started = time.monotonic()
        jobs = list(dict.fromkeys(item.job for item in items))
        try:
            self.engine.forward(items)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._score([item for item in items if item.job is job])
                return
            self._fail(jobs[0], error)
        else:
            self._measure(items, time.monotonic() - started)
        for item in items:
            if self._forget(item):
                item.job.answer(self.engine.info)

    def _measure(self, items: list[ScoreItem], seconds: float) -> None:
        lengths = [len(item.sequence.token_ids) for item in items]
        self._metrics.forward_seconds.observe(seconds)
        self._metrics.batch_fill.observe(sum(lengths) / (len(lengths) * max(lengths)))
        speed = sum(lengths) * len(self._threads) / max(seconds, 1e-9)
        with self._arrived:
            self._tokens_per_s += (_MEAN_WEIGHT if self._tokens_per_s else 1.0) * (speed - self._tokens_per_s)

    def _fail(self, job: ScoreJob, error: Exception) -> None:
        """Give a job its error; one that nobody expected makes the engine prove that it still works."""
        if not isinstance(error, DistillServeError):
            logger.error("scoring failed", exc_info=error, extra={"request_id": job.request_id})
            self._probe(job)
        job.refuse(error)

    def _probe(self, failed: ScoreJob) -> None:
        try:
            self.engine.forward(ScoreJob([EncodedSequence([0, 0], 1)], top_k=1, temperature=1.0).items())
        except Exception as error:  # a dead CUDA context, for one, never comes back in this process
            self._give_up(error, failed)

    def _give_up(self, error: Exception, failed: ScoreJob | None = None) -> None:
        """Score nothing any more, and tell whoever waits.

        Args:
            failed: the job in which the engine broke; its caller is told by that error itself.
        """
        self._on_failure(error)
        with self._arrived:
            self._closed = True
            self._window, self._waiting = [], deque()
            waiting = self._submitted.keys() - {failed}
        for job in waiting:
            job.refuse(engine_failed(error))
