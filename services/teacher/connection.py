"""HTTP/1.1 as uvicorn reads it with httptools, for callers who may send anything."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Bytes that may arrive without completing the headers of a request, a piece of its body or the whole of it.
_MAX_FRUITLESS_BYTES = 64 << 10


class BoundedConnection(HttpToolsProtocol):
    """Headers, trailers and chunk extensions without end are cut off, and what is no HTTP is answered once.

    uvicorn would keep all of the former, and answer a request whose body stops being HTTP a second time.
    """

    _fruitless = 0

    def data_received(self, data: bytes) -> None:
        self._fruitless += len(data)
        super().data_received(data)
        if self._fruitless > _MAX_FRUITLESS_BYTES and not self.transport.is_closing():
            self.send_400_response("Headers or trailers too large.")

    def on_headers_complete(self) -> None:
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
