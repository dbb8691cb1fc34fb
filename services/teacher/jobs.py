"""A score request on its way through an engine: its sequences, and the arrays of its answer as they fill.

Shapes: R rows (completion positions of all sequences of a job), K candidates, M support ids.
"""

import contextlib
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

import numpy as np

from services import logs
from services.errors import RequestError
from services.wire.teacher import TeacherInfo, TeacherScores


def engine_failed(error: Exception) -> RequestError:
    """What callers are told once the engine does not work any more."""
    return RequestError(503, "Engine failed", f"the engine failed ({type(error).__name__})")


def shutting_down() -> RequestError:
    """What callers are told once nothing is taken any more."""
    return RequestError(503, "Shutting down", "this server takes no more requests", retry_after_s=5)


@dataclass(frozen=True)
class EncodedSequence:
    """Token ids of prompt and completion; row i scores token_ids[prompt_length + i]."""

    token_ids: list[int]
    prompt_length: int
    support_ids: list[list[int]] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True)
class Columns:
    """The arrays of an answer, one entry per row."""

    token_ids: np.ndarray  # [R], written by the engine beside their logprobs, so that rows that got mixed up show
    token_logprobs: np.ndarray  # [R]
    topk_ids: np.ndarray  # [R, K]
    topk_logprobs: np.ndarray  # [R, K]
    tail_logprobs: np.ndarray  # [R]
    entropies: np.ndarray  # [R]
    support_logprobs: np.ndarray | None  # [R, M]
    support_tail_logprobs: np.ndarray | None  # [R]

    @classmethod
    def empty(cls, rows: int, top_k: int, support_width: int | None) -> "Columns":
        def floats(*shape: int) -> np.ndarray:
            return np.empty(shape, np.float32)

        return cls(
            token_ids=np.empty(rows, np.int32),
            token_logprobs=floats(rows),
            topk_ids=np.empty((rows, top_k), np.int32),
            topk_logprobs=floats(rows, top_k),
            tail_logprobs=floats(rows),
            entropies=floats(rows),
            support_logprobs=None if support_width is None else floats(rows, support_width),
            support_tail_logprobs=None if support_width is None else floats(rows),
        )

    def write(self, rows: slice, source: "Columns", source_rows: slice) -> None:
        """Copy rows of another request's or batch's arrays of the same widths."""
        for name, column in vars(self).items():
            if column is not None:
                column[rows] = getattr(source, name)[source_rows]


class ScoreJob:
    """One request: engines take its sequences in any order and any company, and the last one completes it.

    Args:
        sequences: at least one, each with a row; already checked against the server's limits.
        top_k: K candidates per row, at most the vocabulary.
        temperature: divides the logits before the softmax.

    Raises:
        RequestError: there is no row to score.
    """

    def __init__(self, sequences: list[EncodedSequence], *, top_k: int, temperature: float) -> None:
        _check_scorable(sequences)
        self.sequences, self.top_k, self.temperature = sequences, top_k, temperature
        self.offsets = np.cumsum([0, *(s.num_rows for s in sequences)], dtype=np.int64)
        self.done: Future[TeacherScores] = Future()
        """The answer, or the error; done before its turn, as when its caller is gone, it is taken out of the queue."""
        self.request_id = logs.request_id.get()
        """Of the request that it is, for the log."""
        self._remaining = len(sequences)
        self._columns: Columns | None = None

    @property
    def support_width(self) -> int | None:
        support = self.sequences[0].support_ids
        return None if support is None else len(support[0])

    def begin(self) -> bool:
        """Make room for the answer before its sequences are scored side by side.

        Returns:
            True the first time: the job has waited until now.
        """
        if self._columns is not None:
            return False
        self._columns = Columns.empty(int(self.offsets[-1]), self.top_k, self.support_width)
        return True

    @property
    def columns(self) -> Columns:
        """Allocated when the first sequence is scored: a queue of large answers costs nothing."""
        self.begin()
        assert self._columns is not None
        return self._columns

    def items(self) -> list["ScoreItem"]:
        return [ScoreItem(self, index) for index in range(len(self.sequences))]

    def finish(self, num_sequences: int) -> bool:
        """Count sequences that are done; True when none is left."""
        self._remaining -= num_sequences
        return self._remaining == 0

    def answer(self, info: TeacherInfo) -> None:
        """Let the caller have the answer, every row of which is filled; too late, it changes nothing."""
        if not self.done.done():
            with contextlib.suppress(InvalidStateError):  # cancelled in between
                self.done.set_result(self.scores(info))

    def refuse(self, error: Exception) -> None:
        """Let the caller have this error instead of an answer; too late, it changes nothing."""
        with contextlib.suppress(InvalidStateError):
            self.done.set_exception(error)

    def scores(self, info: TeacherInfo) -> TeacherScores:
        return TeacherScores(
            model=info.model,
            fingerprint=info.fingerprint,
            temperature=self.temperature,
            top_k=self.top_k,
            row_offsets=self.offsets,
            **vars(self.columns),
        )


@dataclass(frozen=True)
class ScoreItem:
    """One sequence of a job."""

    job: ScoreJob
    index: int

    @property
    def sequence(self) -> EncodedSequence:
        return self.job.sequences[self.index]

    @property
    def rows(self) -> slice:
        """Where its rows lie in the job's columns."""
        return slice(int(self.job.offsets[self.index]), int(self.job.offsets[self.index + 1]))


def _check_scorable(sequences: list[EncodedSequence]) -> None:
    if not sequences:
        raise RequestError(422, "Nothing to score", "sequences is empty; give at least one", field="sequences")
    for index, sequence in enumerate(sequences):
        if sequence.num_rows < 1 or sequence.prompt_length < 1:
            field = f"sequences.{index}.prompt_length"
            raise RequestError(
                422,
                "Nothing to score",
                f"{field} = {sequence.prompt_length} must leave at least one of {len(sequence.token_ids)} tokens on both sides",
                field=field,
            )
