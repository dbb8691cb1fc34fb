"""An answer on its way to a caller who may read it slowly, or not at all."""

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_PIECE_BYTES = 1 << 18


class PacedResponse(Response):
    """A response in pieces, each sent when the one before is on its way.

    Handed over at once, it would lie in the connection's buffer, out of reach of every limit, until its caller reads it.

    Args:
        timeout_s: how long the caller may take; then the connection is closed.
    """

    def __init__(self, content: bytes, media_type: str, timeout_s: float) -> None:
        super().__init__(content, media_type=media_type)
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self._timeout_s):
                for start in range(0, len(self.body), _PIECE_BYTES):
                    piece = self.body[start : start + _PIECE_BYTES]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError as error:
            detail = f"a caller did not take its answer within {self._timeout_s:g} s (transfer_timeout_s)"
            raise ConnectionAbortedError(detail) from error
