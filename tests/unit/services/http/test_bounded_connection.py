"""Connections that bring nothing, or take nothing, are given up; all others are not."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from services.http.bounded_connection import BoundedConnection


class Impatient(BoundedConnection):
    headers_timeout_s = 0.3
    transfer_timeout_s = 0.3


async def application(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            break
    await asyncio.sleep(0.5 if scope["path"] == "/slow" else 0)
    size = 1 << 26 if scope["path"] == "/large" else 2
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    await send({"type": "http.response.body", "body": b"x" * size})


@pytest.fixture
async def server() -> AsyncIterator[uvicorn.Server]:
    options = uvicorn.Config(
        application, host="127.0.0.1", port=0, http=Impatient, lifespan="off", log_level="critical"
    )
    running = uvicorn.Server(options)
    task = asyncio.create_task(running._serve())
    while not running.started:
        await asyncio.sleep(0.01)
    yield running
    running.should_exit = running.force_exit = True
    await task


async def connected(server: uvicorn.Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())


async def ends(reader: asyncio.StreamReader) -> bool:
    """Whether the server closes within two seconds."""
    try:
        async with asyncio.timeout(2.0):
            while await reader.read(1 << 16):
                pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


async def answer(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(3.0):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(2)
    return head.splitlines()[0]


REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nab"
SLOW = REQUEST.replace(b"/ ", b"/slow ", 1)


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET / HTTP/1.1\r\nhost: x\r\n"])
async def test_headers_that_do_not_come_are_waited_for_a_while(server: uvicorn.Server, sent: bytes) -> None:
    reader, writer = await connected(server)
    writer.write(sent)
    await asyncio.sleep(0.1)
    assert len(server.server_state.connections) == 1
    assert await ends(reader) and not server.server_state.connections


async def test_a_drop_at_a_time_does_not_put_the_end_off(server: uvicorn.Server) -> None:
    reader, writer = await connected(server)

    async def drip() -> None:
        for byte in b"GET / HTTP/1.1\r\nx-long: " + b"x" * 100:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    assert await ends(reader)
    dripping.cancel()


async def test_the_second_request_of_a_connection_has_its_own_time(server: uvicorn.Server) -> None:
    reader, writer = await connected(server)
    for pause in (0.2, 0.5, 0.0):  # idle connections are uvicorn's to close
        writer.write(REQUEST)
        assert await answer(reader) == b"HTTP/1.1 200 OK"
        await asyncio.sleep(pause)
    writer.write(REQUEST[:20])
    assert await ends(reader)


async def test_answers_and_bodies_may_take_longer_than_headers(server: uvicorn.Server) -> None:
    reader, writer = await connected(server)
    writer.write(SLOW[:-1])
    await asyncio.sleep(0.6)
    writer.write(SLOW[-1:])
    assert await answer(reader) == b"HTTP/1.1 200 OK"
    writer.close()


async def test_an_answer_that_nobody_takes_is_given_up(server: uvicorn.Server) -> None:
    reader, writer = await connected(server)
    assert isinstance(writer.transport, asyncio.Transport)
    writer.transport.pause_reading()
    writer.write(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
    await asyncio.sleep(0.2)
    assert len(server.server_state.connections) == 1
    await asyncio.sleep(0.5)
    assert not server.server_state.connections
    assert not reader.at_eof()
    writer.close()


async def test_an_answer_that_is_taken_slowly_is_finished(server: uvicorn.Server) -> None:
    reader, writer = await connected(server)
    writer.write(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
    received = 0
    async with asyncio.timeout(20):
        while received < 1 << 26:
            part = await reader.read(1 << 21)
            assert part
            received += len(part)
            await asyncio.sleep(0.01)
    writer.close()
