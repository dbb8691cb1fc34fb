"""Ten thousand damaged requests to the real teacher: none makes it fail, hang or grow.

What was sent is made of SEED alone; the number in a failure's message finds it again.
"""

import json
import random
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from services.teacher.api.examples import REQUEST_EXAMPLES
from tests.integration.processes import Server
from tests.integration.raw_http import connection, head, read_answer

pytestmark = pytest.mark.integration

SEED = 8101
NUM_BODIES, NUM_FIRST = 10_000, 1_000
NUM_CONNECTIONS = 4
MAX_GROWTH_MIB = 32
SEEDS: list[Any] = [example["value"] for example in REQUEST_EXAMPLES.values()]
GOOD = json.dumps(SEEDS[0]).encode()
TOKENS = (
    b"NaN",
    b"-1",
    b"1e999",
    b"null",
    b"true",
    b'"',
    b"\\ud800",
    b"{",
    b"[",
    b"]}",
    b",",
    b"\x00",
    b"\xff",
    b"9" * 40,
)
ODD_HEADERS: list[dict[str, object]] = [
    {"transfer_encoding": "gzip"},
    {"transfer_encoding": "chunked, chunked"},
    {"content_length": "-1"},
    {"content_length": "1e3"},
    {"content_length": "99999999999999999999"},
    {"content_length": 5, "Content_Length": 6},
    {"content_length": 5, "transfer_encoding": "chunked"},
    {"content_encoding": "gzip"},
    {"content_encoding": "\xff"},
    {"expect": "100-continue"},
    {"expect": "the unexpected"},
    {"accept": "\x00"},
    {"accept": ", ;q=\xff"},
    {"x_request_id": "a\x7fb"},
    {"connection": "close, upgrade", "upgrade": "h2c"},
    {"host": ""},
    {"": "no name"},
]


def mutated(rng: random.Random) -> bytes:
    """A valid body with one to four kinds of damage, or bytes that never were one."""
    if rng.random() < 0.02:
        return rng.randbytes(rng.randrange(200))
    body = bytearray(json.dumps(rng.choice(SEEDS)).encode())
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(body) + 1)
        match rng.randrange(8):
            case 0 if at < len(body):
                body[at] ^= 1 << rng.randrange(8)
            case 1:
                del body[at:]
            case 2:
                body[at:at] = rng.randbytes(rng.randint(1, 8))
            case 3:
                body[at:at] = rng.choice(TOKENS)
            case 4:
                other = json.dumps(rng.choice(SEEDS)).encode()
                body[at:] = other[rng.randrange(len(other)) :]
            case 5 | 6:  # a digit becomes another: what is asked changes, what is JSON stays so
                digits = [index for index, byte in enumerate(body) if byte in b"0123456789"]
                if digits:
                    body[rng.choice(digits)] = rng.choice(b"0123456789")
            case _:
                del body[at : at + rng.randint(1, 8)]
    return bytes(body)


def chunked(body: bytes, rng: random.Random) -> bytes:
    """`body` in chunks, some of them with a wrong length."""
    parts = [body[start : start + 40] for start in range(0, len(body), 40)]
    lengths = [len(part) + (rng.randint(-3, 3) if rng.random() < 0.1 else 0) for part in parts]
    chunks = (b"%x\r\n%s\r\n" % (max(length, 0), part) for length, part in zip(lengths, parts, strict=True))
    return b"".join(chunks) + b"0\r\n\r\n"


def requests_of(worker: int, count: int) -> Iterator[tuple[int, bytes, bool]]:
    """(number, bytes, whether the connection can be used again afterwards)."""
    for index in range(count):
        number = worker * count + index
        rng = random.Random(SEED * NUM_BODIES + number)
        body = mutated(rng)
        media_type = {
            "content_type": "application/json" if rng.random() < 0.97 else rng.choice(["", "text/plain", "\xff"])
        }
        kind = rng.random()
        if kind < 0.9:
            yield number, head(content_length=len(body), **media_type) + body, True
        elif kind < 0.94:
            wrong = max(0, len(body) + rng.choice([-5, -1, 1, 5]))
            yield number, head(content_length=wrong, **media_type) + body, False
        elif kind < 0.97:
            yield number, head(transfer_encoding="chunked", **media_type) + chunked(body, rng), False
        else:
            odd = rng.choice(ODD_HEADERS)
            yield number, head(**media_type, **({"content_length": len(body)} | odd)) + body, False


def exchange(sock: socket.socket, message: bytes, *, last: bool) -> tuple[int, dict[str, str]]:
    """(status, headers) of the first answer; 0 when the server closed without one."""
    try:
        sock.sendall(message)
        if last:
            sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it has answered, and closed, before everything was sent
    status, headers, _ = read_answer(sock)
    return status, headers


def attack(server: Server, worker: int, count: int) -> Counter[int]:
    statuses: Counter[int] = Counter()
    messages = requests_of(worker, count)
    message = next(messages, None)
    while message is not None:
        with connection(server) as sock:
            reusable = True
            while reusable and message is not None:
                number, content, clean = message
                try:
                    status, headers = exchange(sock, content, last=not clean)
                except TimeoutError:
                    pytest.fail(f"no answer within 20 s: SEED = {SEED}, number {number}")
                assert status < 500 and (status or not clean), f"SEED = {SEED}, number {number}: {status}"
                statuses[status] += 1
                reusable = clean and headers.get("connection") != "close"
                message = next(messages, None)
    return statuses


def attack_all(server: Server, count: int) -> Counter[int]:
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        share = count // NUM_CONNECTIONS
        results = [pool.submit(attack, server, worker, share) for worker in range(NUM_CONNECTIONS)]
        return sum((result.result() for result in results), Counter())


@pytest.mark.parametrize("num_bodies", [NUM_BODIES // 5, pytest.param(NUM_BODIES, marks=pytest.mark.long)])
def test_thousands_of_damaged_requests(num_bodies: int, teacher_server: Server) -> None:
    with teacher_server.client() as client:
        headers = {"content-type": "application/json"}
        expected = client.post("/v1/teacher/logprobs", content=GOOD, headers=headers).json()
        attack_all(teacher_server, NUM_FIRST)  # what is loaded and allocated once
        before = teacher_server.memory_mib()
        statuses = attack_all(teacher_server, num_bodies)
        grown = teacher_server.memory_mib() - before
        print(f"answers: {dict(sorted(statuses.items()))}; memory: {before:.0f} MiB, {grown:+.1f}")
        assert client.post("/v1/teacher/logprobs", content=GOOD, headers=headers).json() == expected
    assert sum(statuses.values()) == num_bodies
    # The damage is of all kinds: what is still valid is scored, what is no JSON and no request is told apart.
    assert min(statuses[200], statuses[400], statuses[422]) > num_bodies // 100
    assert grown < MAX_GROWTH_MIB, f"SEED = {SEED}"
    assert teacher_server.metric("pending_requests") == 0
