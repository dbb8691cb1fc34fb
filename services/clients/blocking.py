"""TeacherClient for programs without an event loop: scripts, notebooks, data loaders."""

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import httpx
from anyio.from_thread import start_blocking_portal

from services.clients.outage import Answer
from services.clients.teacher import LogprobDtype, OnMismatch, OnRefused, TeacherClient
from services.clients.teacher_answers import TokenIdsAndPromptLength
from services.errors import ClientClosedError
from services.wire.teacher import TeacherInfo, TeacherScores


class BlockingTeacherClient:
    """The methods of TeacherClient, each returning when its answer is there; they may be called from any thread.

    The client works in an event loop of its own, in a thread that ends with `close`; leaving the block because of
    an exception (Ctrl-C) cancels what is under way.

    >>> with BlockingTeacherClient(["http://127.0.0.1:8101"]) as teacher:  # doctest: +SKIP
    ...     scores = teacher.score_text([("47+85=", "132"), ("2+2=", "5")], top_k=3)
    ...     first = slice(scores.row_offsets[0], scores.row_offsets[1])
    ...     print(scores.token_ids[first], scores.token_logprobs[first].sum())

    Args:
        urls, key, timeout_s, outage_s, attempts, transport: as of TeacherClient.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        key: str | None = None,
        timeout_s: float = 300.0,
        outage_s: float = 300.0,
        attempts: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._client = TeacherClient(
            urls, key=key, timeout_s=timeout_s, outage_s=outage_s, attempts=attempts, transport=transport
        )
        self._closed = False
        self._stack = ExitStack()
        self._portal = self._stack.enter_context(start_blocking_portal(name="teacher-client"))
        self._stack.callback(self._portal.call, self._client.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._closed = True
        self._stack.__exit__(*error)

    def close(self) -> None:
        """Close the connections and end the thread; once more does nothing."""
        self._closed = True
        self._stack.close()

    def _wait(self, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """The result of `work`, which ends when the caller is interrupted.

        Raises:
            ClientClosedError: the thread has ended.
        """
        try:
            result = self._portal.start_task_soon(work)
        except RuntimeError as error:
            if not self._closed:
                raise
            raise ClientClosedError(
                f"the BlockingTeacherClient of {', '.join(self._client.urls)} is closed; make a new one, or ask before its close"
            ) from error
        try:
            return result.result()
        except BaseException:
            result.cancel()
            raise

    def wait_ready(self, timeout_s: float, on_wait: Callable[[str], None] | None = None) -> None:
        """As TeacherClient.wait_ready."""
        self._wait(partial(self._client.wait_ready, timeout_s, on_wait))

    def info(self) -> list[TeacherInfo]:
        """As TeacherClient.info."""
        return self._wait(self._client.info)

    def vocabulary(self) -> dict[str, int]:
        """As TeacherClient.vocabulary."""
        return self._wait(self._client.vocabulary)

    def score(
        self,
        sequences: list[TokenIdsAndPromptLength],
        *,
        top_k: int,
        temperature: float = 1.0,
        support_ids: list[list[list[int]]] | None = None,
        max_rows_per_request: int | None = None,
        on_mismatch: OnMismatch = "raise",
        on_refused: OnRefused | None = None,
    ) -> TeacherScores:
        """As TeacherClient.score; `on_refused` is called in the client's own thread."""
        work = partial(
            self._client.score,
            sequences,
            top_k=top_k,
            temperature=temperature,
            support_ids=support_ids,
            max_rows_per_request=max_rows_per_request,
            on_mismatch=on_mismatch,
            on_refused=on_refused,
        )
        return self._wait(work)

    def score_text(self, texts: list[tuple[str, str]], *, top_k: int, temperature: float = 1.0) -> TeacherScores:
        """As TeacherClient.score_text."""
        return self._wait(partial(self._client.score_text, texts, top_k=top_k, temperature=temperature))

    def score_sequences(
        self,
        sequences: list[dict[str, Any]],
        *,
        top_k: int,
        temperature: float = 1.0,
        logprob_dtype: LogprobDtype = "float32",
        max_rows_per_request: int | None = None,
        on_mismatch: OnMismatch = "raise",
        on_refused: OnRefused | None = None,
    ) -> TeacherScores:
        """As TeacherClient.score_sequences."""
        work = partial(
            self._client.score_sequences,
            sequences,
            top_k=top_k,
            temperature=temperature,
            logprob_dtype=logprob_dtype,
            max_rows_per_request=max_rows_per_request,
            on_mismatch=on_mismatch,
            on_refused=on_refused,
        )
        return self._wait(work)
