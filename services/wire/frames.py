"""Length-prefixed frames of a stream.

A frame is a little-endian uint32 byte count followed by that many bytes of one safetensors document; a stream ends with a
frame of zero bytes, so that a reader can tell a finished stream from a broken one. While there is nothing to send, a count
of 2^32 - 1 without a document says that the server lives.
"""

import struct
from collections.abc import AsyncIterator

from services.errors import PeerError

FRAMES_MEDIA_TYPE = "application/x-safetensors-frames"
END_OF_STREAM = struct.pack("<I", 0)
HEARTBEAT_S = 10.0
"""Silence of a stream, at most, seconds."""
HEARTBEAT = struct.pack("<I", (1 << 32) - 1)
_PREFIX = struct.Struct("<I")
_MAX_FRAME_BYTES = 1 << 30


def frame(document: bytes) -> bytes:
    """A document as a part of a stream."""
    return _PREFIX.pack(len(document)) + document


async def read_frames(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Cut a byte stream into documents; heartbeats are left out.

    Raises:
        PeerError: the stream broke off before its end mark, or a frame is absurdly large.
    """
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= _PREFIX.size:
            if buffer.startswith(HEARTBEAT):
                del buffer[: _PREFIX.size]
                continue
            (size,) = _PREFIX.unpack_from(buffer)
            if size == 0:
                return
            if size > _MAX_FRAME_BYTES:
                raise PeerError(f"a frame of {size} bytes announced, more than {_MAX_FRAME_BYTES} are never sent")
            if len(buffer) < _PREFIX.size + size:
                break
            yield bytes(buffer[_PREFIX.size : _PREFIX.size + size])
            del buffer[: _PREFIX.size + size]
    raise PeerError("the stream broke off before its end mark")
