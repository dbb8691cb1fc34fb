"""The teacher's engine behind its queue, without HTTP: who is accepted, and whether the engine still works.

consumes   TeacherRequests that hold a place
produces   their scores, or a RequestError
waits for  the batcher; past max_pending_requests a request is told to come back
unblocked  by the forward passes before
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from services.config import TeacherConfig
from services.errors import RequestError
from services.metrics import TeacherMetrics
from services.schemas import TeacherRequest, TeacherScores
from services.teacher.batcher import Batcher, engine_failed
from services.teacher.engine_transformers import TransformersEngine
from services.teacher.jobs import ScoreJob
from services.teacher.requests import encode_request


class TeacherService:
    """Accepts requests, makes jobs of them, and hands out the answers."""

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.engine: TransformersEngine | None = None
        self.metrics = TeacherMetrics()
        self.draining = False
        self.failure: Exception | None = None
        self.on_failure: Callable[[Exception], None] = lambda error: None
        self._batcher: Batcher | None = None
        # Tokenizers must not be called by two threads at once, and long texts must not hold up /health.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-requests")
        self._pending = 0

    async def load(self) -> None:
        """Load the model beside the event loop; /ready answers 503 until then."""
        engine = await asyncio.to_thread(TransformersEngine, self.config)
        self._batcher = Batcher(engine, self.config.tokens_per_forward, self.metrics, self._engine_failed)
        self.engine = engine

    def _engine_failed(self, error: Exception) -> None:
        self.failure = error
        self.on_failure(error)

    def ready_engine(self) -> TransformersEngine:
        """The engine, or a 503.

        Raises:
            RequestError: still loading, shutting down, or broken.
        """
        self.check_alive()
        if self.draining:
            raise RequestError(503, "Shutting down", "this server takes no more requests", retry_after_s=5)
        if self.engine is None:
            raise RequestError(503, "Loading", "the teacher is still being loaded", retry_after_s=2)
        return self.engine

    def check_alive(self) -> None:
        """Raises a 503 RequestError when the engine broke: this process will not score again."""
        if self.failure is not None:
            raise engine_failed(self.failure)

    @property
    def pending(self) -> int:
        """Accepted requests without an answer."""
        return self._pending

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the accepted requests, given back at the end.

        Raises:
            RequestError: too many are accepted already, or the engine is not ready.
        """
        self.ready_engine()
        if self._pending >= self.config.max_pending_requests:
            raise RequestError(
                429,
                "Too many requests",
                f"{self._pending} requests wait already (max_pending_requests); try again later",
                retry_after_s=max(1.0, self._batcher.backlog_s() if self._batcher else 1.0),
            )
        self._pending += 1
        self.metrics.pending.set(self._pending)
        try:
            yield
        finally:
            self._pending -= 1
            self.metrics.pending.set(self._pending)

    async def score(self, request: TeacherRequest) -> TeacherScores:
        """Score one request that has its `place`; one that is cancelled before its turn is skipped.

        Raises:
            RequestError: the request is refused.
        """
        engine, loop = self.engine, asyncio.get_running_loop()
        assert engine is not None and self._batcher is not None
        sequences = await loop.run_in_executor(
            self._reader, encode_request, request, engine.info, self.config, engine.tokenizer
        )
        self.check_alive()
        job = ScoreJob(sequences, top_k=request.top_k, temperature=request.temperature)
        self._batcher.submit(job)
        scores = await asyncio.wrap_future(job.done)  # cancelling the one cancels the other
        self.metrics.sequences.inc(len(sequences))
        self.metrics.rows.inc(len(scores.token_logprobs))
        self.metrics.tokens.inc(sum(len(s.token_ids) for s in sequences))
        return scores

    def close(self) -> None:
        self._reader.shutdown(wait=True)
        if self._batcher is not None:
            self._batcher.close()
