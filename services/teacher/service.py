"""The teacher's engine behind its queue, without HTTP: who is accepted, whose turn it is, whether the engine still works.

consumes   TeacherRequests that hold a place
produces   their scores, or a RequestError
waits for  the one engine thread; past max_pending_requests a request is told to come back
unblocked  by the forward pass before
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from services.config import TeacherConfig
from services.errors import RequestError
from services.metrics import TeacherMetrics
from services.schemas import TeacherRequest, TeacherScores
from services.teacher.engine_transformers import EncodedSequence, TransformersEngine
from services.teacher.requests import encode_request

# Weight of the newest request in the running mean of their time in the engine, which Retry-After is.
_MEAN_WEIGHT = 0.2


class TeacherService:
    """The engine behind its queue: one thread scores, requests wait in order."""

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.engine: TransformersEngine | None = None
        self.metrics = TeacherMetrics()
        self.draining = False
        self.failure: Exception | None = None
        self.on_failure: Callable[[Exception], None] = lambda error: None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-engine")
        # Tokenizers must not be called by two threads at once, and long texts must not hold up /health.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-requests")
        self._pending = 0
        self._mean_score_s = 0.0

    async def load(self) -> None:
        """Load the model on the engine's thread; /ready answers 503 until then."""
        self.engine = await asyncio.get_running_loop().run_in_executor(self._thread, TransformersEngine, self.config)

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
            raise RequestError(503, "Engine failed", f"the engine failed ({type(self.failure).__name__})")

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
                retry_after_s=max(1.0, self._mean_score_s),
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
        assert engine is not None
        sequences = await loop.run_in_executor(
            self._reader, encode_request, request, engine.info, self.config, engine.tokenizer
        )
        accepted = time.monotonic()

        def work() -> TeacherScores:
            self.metrics.wait_seconds.observe(time.monotonic() - accepted)
            return self._run(engine, sequences, request)

        # The one place where a batcher across requests goes.
        scores = await loop.run_in_executor(self._thread, work)
        self.metrics.sequences.inc(len(sequences))
        self.metrics.rows.inc(len(scores.token_logprobs))
        self.metrics.tokens.inc(sum(len(s.token_ids) for s in sequences))
        return scores

    def _run(
        self, engine: TransformersEngine, sequences: list[EncodedSequence], request: TeacherRequest
    ) -> TeacherScores:
        """One request on the engine's thread; an unexpected error makes the engine prove that it still works."""
        self.check_alive()
        started = time.monotonic()
        try:
            with self.metrics.score_seconds.time():
                return engine.score(sequences, top_k=request.top_k, temperature=request.temperature)
        except RequestError:
            raise
        except Exception:
            self._probe(engine)
            raise
        finally:
            self._mean_score_s += _MEAN_WEIGHT * (time.monotonic() - started - self._mean_score_s)

    def _probe(self, engine: TransformersEngine) -> None:
        try:
            engine.score([EncodedSequence([0, 0], 1)], top_k=1, temperature=1.0)
        except Exception as error:  # a dead CUDA context, for one, never comes back in this process
            self.failure = error
            self.on_failure(error)

    def close(self) -> None:
        self._reader.shutdown(wait=True)
        self._thread.shutdown(wait=True)
