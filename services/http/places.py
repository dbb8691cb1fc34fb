"""How many requests a server has accepted and not answered yet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.errors import RequestError


class Places:
    """Requests beyond a limit are told to come back.

    Args:
        limit: of requests at once (max_pending_requests).
        on_change: told of every new number.
    """

    def __init__(self, limit: int, on_change: Callable[[int], object] = lambda taken: None) -> None:
        self._limit, self._on_change = limit, on_change
        self.taken = 0

    @contextmanager
    def take(self, retry_after_s: Callable[[], float]) -> Iterator[None]:
        """A place for one request inside the block: until its answer is sent.

        Args:
            retry_after_s: when one that is refused may come again, seconds.

        Raises:
            RequestError: all are taken.
        """
        if self.taken >= self._limit:
            raise RequestError(
                429,
                "Too many requests",
                f"{self.taken} requests wait already (max_pending_requests); try again later",
                retry_after_s=retry_after_s(),
            )
        self._set(self.taken + 1)
        try:
            yield
        finally:
            self._set(self.taken - 1)

    def _set(self, taken: int) -> None:
        self.taken = taken
        self._on_change(taken)
