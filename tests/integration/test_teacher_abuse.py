"""The teacher as a real process, sent what it must refuse: it says why, stays as small as it was, and goes on scoring."""

import json
import pickle
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from services.errors import PROBLEM_MEDIA_TYPE
from services.wire.document import SAFETENSORS_MEDIA_TYPE
from tests.integration.processes import Server, server, wait_until
from tests.integration.raw_http import JSON, connection, head, read_answer

pytestmark = [pytest.mark.integration, pytest.mark.alone]

SEQUENCE = {"token_ids": [60, 61, 62], "prompt_length": 1}
GOOD = {"sequences": [SEQUENCE], "top_k": 2}


def body_of(sequence: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({**GOOD, "sequences": [{**SEQUENCE, **sequence}], **changes}).encode()


TEXT = b'{"sequences": [{"prompt": "a", "completion": "%s"}], "top_k": 1}'
BAD: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "k below 1": (body_of({}, top_k=-1), {}, 422, "top_k"),
    "k above the limit": (body_of({}, top_k=101), {}, 422, "top_k"),
    "id beyond the vocabulary": (body_of({"token_ids": [5, 261]}), {}, 422, "sequences.0.token_ids"),
    "negative id": (body_of({"token_ids": [5, -1]}), {}, 422, "sequences.0.token_ids.1"),
    "id that is a float": (body_of({"token_ids": [5, 1.0]}), {}, 422, "sequences.0.token_ids.1"),
    "id that is a bool": (body_of({"token_ids": [5, True]}), {}, 422, "sequences.0.token_ids.1"),
    "id that is a string": (body_of({"token_ids": [5, "6"]}), {}, 422, "sequences.0.token_ids.1"),
    "id of 64 bits": (body_of({"token_ids": [5, 2**64]}), {}, 422, "sequences.0.token_ids.1"),
    "id of 5000 digits": (body_of({}).replace(b"62", b"9" * 5000), {}, 400, "body"),
    "no tokens": (body_of({"token_ids": []}), {}, 422, "sequences.0.prompt_length"),
    "no sequences": (json.dumps({**GOOD, "sequences": []}).encode(), {}, 422, "sequences"),
    "too long": (body_of({"token_ids": [5] * 257}), {}, 422, "sequences.0.token_ids"),
    "too many": (json.dumps({**GOOD, "sequences": [SEQUENCE] * 65}).encode(), {}, 413, "sequences"),
    "too many tokens": (
        json.dumps({**GOOD, "sequences": [{**SEQUENCE, "token_ids": [5] * 256}] * 17}).encode(),
        {},
        413,
        "sequences",
    ),
    "invalid UTF-8": (TEXT % b"\xff", {}, 400, "body"),
    "half a surrogate pair": (TEXT % rb"\ud800", {}, 422, "sequences.0.completion"),
    "a text of a million tokens": (TEXT % (b"a" * 1_000_000), {}, 422, "sequences.0.completion"),
    "invalid JSON": (b'{"sequences": [', {}, 400, "body"),
    "not even JSON": (b"\x00" * 1000, {}, 400, "body"),
    "empty": (b"", {}, 400, "body"),
    "nested deeply": (b"[" * 10_000 + b"]" * 10_000, {}, 400, "body"),
    "a million brackets": (b"[" * 1_000_000, {}, 413, "body"),
    "NaN": (body_of({}, temperature=float("nan")), {}, 400, "body"),
    "Infinity": (body_of({}, temperature=float("inf")), {}, 400, "body"),
    "a number beyond doubles": (body_of({}, temperature=77).replace(b"77", b"1e999"), {}, 422, "temperature"),
    "the same key twice": (b'{"top_k": 1, "top_k": 2}', {}, 422, "top_k"),
    "another media type": (body_of({}), {"content-type": "text/plain"}, 415, "content-type"),
    "a form": (b"top_k=1", {"content-type": "application/x-www-form-urlencoded"}, 415, "content-type"),
    "compressed": (body_of({}), {"content-encoding": "gzip"}, 415, "content-encoding"),
    "a pickle": (pickle.dumps(GOOD), {"content-type": "application/octet-stream"}, 415, "content-type"),
    "a pickle that claims to be JSON": (pickle.dumps(GOOD), {}, 400, "body"),
    "safetensors": (save({"a": np.zeros(1)}), {"content-type": "application/x-safetensors"}, 415, "content-type"),
    "safetensors that claim to be JSON": (save({"a": np.zeros(1)}), {}, 400, "body"),
}  # fmt: skip


def test_it_goes_on_scoring_the_same_after_every_bad_request_and_does_not_grow(teacher_server: Server) -> None:
    with teacher_server.client() as client:
        expected = client.post("/v1/teacher/logprobs", json=GOOD).json()
        for rounds in (1, 10):  # the first brings what is loaded lazily
            before = teacher_server.memory_mib()
            for _ in range(rounds):
                for name, (content, headers, status, field) in BAD.items():
                    response = client.post(
                        "/v1/teacher/logprobs", content=content, headers={**JSON, "X-Request-ID": "abc-1", **headers}
                    )
                    problem = response.json()
                    assert (response.status_code, problem["status"], problem["field"]) == (status, status, field), name
                    assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE, name
                    assert problem["request_id"] == response.headers["x-request-id"] == "abc-1", name
                    assert client.post("/v1/teacher/logprobs", json=GOOD).json() == expected, name
    assert teacher_server.memory_mib() - before < 32


def sent_until_refused(sock: socket.socket, part: bytes, most: int) -> int:
    """Bytes that were sent, `part` by `part`, before the server answered or closed; at most `most`."""
    sock.setblocking(False)
    num_sent = 0
    deadline = time.monotonic() + 20
    while num_sent < most and time.monotonic() < deadline:
        try:
            sock.recv(1, socket.MSG_PEEK)
            break
        except BlockingIOError:
            pass
        except ConnectionError:
            break
        try:
            num_sent += sock.send(part)
        except BlockingIOError:
            time.sleep(0.001)
        except ConnectionError:
            break
    sock.settimeout(20)
    return num_sent


@pytest.mark.parametrize(
    ("headers", "part"),
    [
        ({"content_length": 1 << 40}, b"x" * 65536),
        ({"transfer_encoding": "chunked"}, b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    ],
)
def test_a_huge_body_is_refused_before_it_is_there(
    headers: dict[str, object], part: bytes, teacher_server: Server
) -> None:
    before = teacher_server.memory_mib()
    with connection(teacher_server) as sock:
        sock.sendall(head(content_type="application/json", x_request_id="abc-2", **headers))
        num_sent = sent_until_refused(sock, part, 1 << 30)
        status, answered, body = read_answer(sock)
    problem = json.loads(body)
    assert (status, answered["content-type"]) == (413, PROBLEM_MEDIA_TYPE)
    assert "1048576 bytes" in problem["detail"] and problem["request_id"] == "abc-2"
    assert num_sent < 64 << 20  # what fits into the buffers of two sockets, and not a gigabyte
    assert teacher_server.memory_mib() - before < 32


ENDLESS = {
    "header": (b"GET /health HTTP/1.1\r\nHost: x\r\nX-B: ", b"x" * 65536),
    "headers": (b"GET /health HTTP/1.1\r\nHost: x\r\nX-B: ", b"X-A: aaaaaaaaaa\r\n" * 4096),
    "first line": (b"GET /", b"x" * 65536),
    "trailers": (
        head(content_type="application/json", transfer_encoding="chunked") + b"0\r\n",
        b"X-A: aaaaaaaaaa\r\n" * 4096,
    ),
    "chunk extension": (head(content_type="application/json", transfer_encoding="chunked") + b"1;", b"x" * 65536),
}


@pytest.mark.parametrize("which", ENDLESS)
def test_what_never_becomes_a_request_is_cut_off(which: str, teacher_server: Server) -> None:
    """Also for callers without the key, which would come last."""
    beginning, part = ENDLESS[which]
    before = teacher_server.memory_mib()
    with connection(teacher_server) as sock:
        sock.sendall(beginning)
        num_sent = sent_until_refused(sock, part, 1 << 28)
        assert read_answer(sock)[0] in (0, 400)
    assert num_sent < 64 << 20
    assert teacher_server.memory_mib() - before < 32


@pytest.mark.parametrize(
    "request_line",
    ["GET / HTTP/9.9", "GET", "\x00\x01\x02", "GET /\xff HTTP/1.1", "get /health http/1.1", "G" * 100_000],
)
def test_what_is_no_http_is_refused_or_closed(request_line: str, teacher_server: Server) -> None:
    with connection(teacher_server) as sock:
        sock.sendall(head(request_line))
        sock.shutdown(socket.SHUT_WR)
        assert read_answer(sock)[0] in (0, 400, 404, 405)
    with teacher_server.client() as client:
        assert client.post("/v1/teacher/logprobs", json=GOOD).status_code == 200


@pytest.mark.parametrize(("pause", "status"), [(False, b"400"), (True, b"415")], ids=["at once", "after the answer"])
def test_a_body_that_stops_being_http_is_answered_once(pause: bool, status: bytes, teacher_server: Server) -> None:
    """Its media type is refused before the body is read; the fixture looks for tracebacks."""
    with connection(teacher_server) as sock:
        sock.sendall(
            head(content_type="text/plain", transfer_encoding="chunked") + (b"" if pause else b"no length\r\n")
        )
        received = sock.recv(1 << 16)
        if pause:
            sock.sendall(b"no length\r\n")
        while part := sock.recv(1 << 16):
            received += part
    assert received.startswith(b"HTTP/1.1 " + status) and received.count(b"HTTP/1.1") == 1


def test_no_websocket_is_opened(teacher_server: Server) -> None:
    upgrade = {"upgrade": "websocket", "sec_websocket_version": 13, "sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ=="}
    with connection(teacher_server) as sock:
        sock.sendall(head("GET /v1/teacher/logprobs HTTP/1.1", connection="Upgrade", **upgrade))
        assert read_answer(sock)[0] == 403


# ------------------------------------------------------------------------------------------ slow callers


@pytest.fixture(scope="module")
def impatient(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A teacher of two places that waits for half a second."""
    limits = ("--teacher.max_pending_requests", "2", "--teacher.transfer_timeout_s", "0.5")
    log = tmp_path_factory.mktemp("logs") / "log"
    with server("teacher", log, "--teacher.model", models["qwen3"], *limits) as running:
        yield running


def test_bodies_that_stall_do_not_keep_their_places(impatient: Server) -> None:
    with connection(impatient) as first, connection(impatient) as second, impatient.client() as client:
        for sock in (first, second):
            sock.sendall(head(content_type="application/json", content_length=100) + b'{"top_k"')
        wait_until(lambda: impatient.metric("pending_requests") == 2)
        assert client.post("/v1/teacher/logprobs", json=GOOD).status_code == 429
        answers = [read_answer(sock) for sock in (first, second)]
        assert client.post("/v1/teacher/logprobs", json=GOOD).status_code == 200
    for status, headers, body in answers:
        assert (status, headers["content-type"], json.loads(body)["field"]) == (408, PROBLEM_MEDIA_TYPE, "body")


def test_answers_that_nobody_reads_do_not_keep_their_places_or_pile_up(impatient: Server) -> None:
    """Ten answers of 20 MB, all open at the end; in the buffers of their connections they would be 200 MB."""
    body = json.dumps({"sequences": [{"token_ids": [5] * 256, "prompt_length": 1}] * 40, "top_k": 256}).encode()
    request = head(content_type="application/json", content_length=len(body), accept=SAFETENSORS_MEDIA_TYPE) + body
    with ExitStack() as unread:
        for number in range(12):
            if number == 2:  # both places have been through it once
                before = impatient.memory_mib()
            sock = unread.enter_context(connection(impatient))
            sock.sendall(request)
            wait_until(lambda: impatient.metric("pending_requests") < 2)
        wait_until(lambda: impatient.metric("pending_requests") == 0)
        assert impatient.memory_mib() - before < 100  # seen: up to 80, when other processes have the processors
        assert impatient.metric("rows_total") == 12 * 40 * 255 + 2  # two are of GOOD
    assert "Traceback" not in impatient.log.read_text()
