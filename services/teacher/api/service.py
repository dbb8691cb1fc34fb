"""The teacher's engine behind its queue, without HTTP: who is accepted, and whether the engine still works.

consumes   TeacherRequests that hold a place
produces   their scores, or a RequestError
waits for  the scorer; past max_pending_requests a request is told to come back
unblocked  by the requests before
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

from services.config import TeacherConfig
from services.errors import RequestError
from services.http.metrics import TeacherMetrics
from services.http.places import Places
from services.teacher.api.body import parse_request
from services.teacher.api.requests import encode_request
from services.teacher.jobs import ScoreJob, engine_failed, shutting_down
from services.teacher.scorers import Scorer, abandon_loading, load_scorer
from services.wire.teacher import TeacherRequest, TeacherScores

# Read in less time than it takes to wake the thread that reads the others.
_SMALL_BODY_BYTES = 16 << 10
_SMALL_NUM_IDS = 4096

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class TeacherService:
    """Accepts requests, makes jobs of them, and hands out the answers."""

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.scorer: Scorer | None = None
        self.metrics = TeacherMetrics()
        self.draining = False
        self.failure: Exception | None = None
        self.on_failure: Callable[[Exception], None] = lambda error: None
        self._closing = threading.Lock()
        self._closed = False
        # Tokenizers must not be called by two threads at once, and large bodies and texts must not hold up /health.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-requests")
        self._places = Places(config.max_pending_requests, on_change=self.metrics.pending.set)

    async def load(self) -> None:
        """Load the model beside the event loop; /ready answers 503 until then."""
        await asyncio.to_thread(self._load)

    def _load(self) -> None:
        scorer = load_scorer(self.config, self.metrics, self._engine_failed)
        with self._closing:
            if not self._closed:
                self.scorer = scorer
                return
        scorer.close()  # nobody waited for it

    def _engine_failed(self, error: Exception) -> None:
        if self.draining and self.pending == 0:
            return  # a signal to the whole process group ends an engine's own processes as well, and we are leaving
        self.failure = error
        self.on_failure(error)

    def ready_scorer(self) -> Scorer:
        """What scores, or a 503.

        Raises:
            RequestError: still loading, shutting down, or broken.
        """
        self.check_alive()
        if self.draining:
            raise shutting_down()
        if self.scorer is None:
            raise RequestError(503, "Loading", "the teacher is still being loaded", retry_after_s=2)
        return self.scorer

    def check_alive(self) -> None:
        """Raises a 503 RequestError when the engine broke: this process will not score again."""
        if self.failure is not None:
            raise engine_failed(self.failure)

    @property
    def pending(self) -> int:
        """Accepted requests without an answer."""
        return self._places.taken

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the accepted requests, given back at the end.

        Raises:
            RequestError: too many are accepted already, or the engine is not ready.
        """
        scorer = self.ready_scorer()
        with self._places.take(lambda: max(1.0, scorer.backlog_s())):
            yield

    async def parse(self, body: bytes) -> TeacherRequest:
        """The request that a body spells, as `parse_request`."""
        if len(body) <= _SMALL_BODY_BYTES:
            return parse_request(body, self.config)
        return await self._in_reader(parse_request, body, self.config)

    async def job(self, request: TeacherRequest) -> ScoreJob:
        """What the engine is to do for a request that has its `place`.

        Raises:
            RequestError: the request is refused.
        """
        scorer = self.scorer
        assert scorer is not None
        if _is_small(request):
            sequences = encode_request(request, scorer.info, self.config, scorer.tokenizer)
        else:
            sequences = await self._in_reader(encode_request, request, scorer.info, self.config, scorer.tokenizer)
        return ScoreJob(sequences, top_k=request.top_k, temperature=request.temperature)

    async def _in_reader(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Run `work` in the one thread that reads requests, in turn: they share the tokenizer, and the memory of reading."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work, *arguments)

    async def score(self, job: ScoreJob) -> TeacherScores:
        """The engine's answer; a job that is cancelled or refused before its turn is skipped.

        Raises:
            RequestError: the job is refused.
        """
        self.check_alive()
        assert self.scorer is not None
        self.scorer.submit(job)
        scores = await asyncio.wrap_future(job.done)  # cancelling the one cancels the other
        self.metrics.sequences.inc(len(job.sequences))
        self.metrics.rows.inc(len(scores.token_logprobs))
        self.metrics.tokens.inc(sum(len(s.token_ids) for s in job.sequences))
        return scores

    def close(self) -> None:
        self._reader.shutdown(wait=True)
        with self._closing:
            self._closed = True
        if self.scorer is None:
            abandon_loading()
        else:
            self.scorer.close()


def _is_small(request: TeacherRequest) -> bool:
    """Whether there is nothing to tokenize and little to check."""
    given = [s.token_ids for s in request.sequences if s.token_ids is not None and s.support_ids is None]
    return len(given) == len(request.sequences) and sum(map(len, given)) <= _SMALL_NUM_IDS
