"""HTTP/1.1 as uvicorn reads it with httptools, for callers who may send anything, or nothing."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Bytes that may arrive without completing the headers of a request, a piece of its body or the whole of it.
_MAX_FRUITLESS_BYTES = 64 << 10


class BoundedConnection(HttpToolsProtocol):
    """Headers, trailers and chunk extensions without end are cut off, and what is no HTTP is answered once.

    uvicorn would keep all of the former, and answer a request whose body stops being HTTP a second time. It would also
    wait for ever for headers, and for a caller who does not read. Such a connection is aborted: closing it would wait
    until its caller has taken what is left.
    """

    headers_timeout_s = 10.0
    """How long the headers of a request may take, the first one's from the connection on."""
    transfer_timeout_s = 120.0
    """How long a caller may take nothing of its answer."""

    _fruitless = 0
    _headers_late: asyncio.TimerHandle | None = None
    _reading_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_headers_late()
        self._cancel_reading_late()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._fruitless += len(data)
        super().data_received(data)
        if self._fruitless > _MAX_FRUITLESS_BYTES and not self.transport.is_closing():
            self.send_400_response("Headers or trailers too large.")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        self._cancel_reading_late()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._headers_late is None:
            self._await_headers()

    def on_headers_complete(self) -> None:
        self._cancel_headers_late()
        self._fruitless = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._fruitless = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._fruitless = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and (self.cycle.more_body or not self.cycle.response_complete):
            if self.cycle.response_started:  # by its route
                self.transport.close()
                return
            self.cycle.disconnected = True  # its route shall not answer any more
            self.cycle.message_event.set()
        super().send_400_response(msg)

    def _await_headers(self) -> None:
        self._headers_late = self.loop.call_later(self.headers_timeout_s, self.transport.abort)

    def _await_reading(self) -> None:
        untaken = self.transport.get_write_buffer_size()
        self._reading_late = self.loop.call_later(self.transfer_timeout_s, self._check_reading, untaken)

    def _check_reading(self, untaken: int) -> None:
        if self.transport.get_write_buffer_size() < untaken:
            self._await_reading()
        else:
            self.transport.abort()

    def _cancel_headers_late(self) -> None:
        if self._headers_late is not None:
            self._headers_late.cancel()
            self._headers_late = None

    def _cancel_reading_late(self) -> None:
        if self._reading_late is not None:
            self._reading_late.cancel()
            self._reading_late = None
