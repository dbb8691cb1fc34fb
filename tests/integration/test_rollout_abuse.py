"""The rollout server, sent what it must refuse: it stays quick to answer others, and as small as it was."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from services.http.bounded_connection import BoundedConnection
from tests.integration.processes import Server, wait_until
from tests.integration.raw_http import connection, read_answer

pytestmark = pytest.mark.integration

LARGE = 64 << 20


@contextmanager
def answering(running: Server) -> Iterator[None]:
    """/health answers within half a second throughout."""
    waits: list[float] = []
    done = threading.Event()

    def ask() -> None:
        with running.client() as client:
            while not done.is_set():
                started = time.monotonic()
                client.get("/health").raise_for_status()
                waits.append(time.monotonic() - started)
                time.sleep(0.02)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        done.set()
        asking.join()
    print(f"/health: {len(waits)} answers, the slowest after {max(waits):.3f} s")
    assert len(waits) > 3 and max(waits) < 0.5


def num_descriptors(running: Server) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


@pytest.mark.alone
def test_bodies_of_64_mib_without_sense_cost_others_no_time_and_no_memory(rollout_server: Server) -> None:
    bodies = [b"1," * (LARGE // 2), b'{"prompts": [[' + b"1," * (LARGE // 2 - 16), b"[" * LARGE]
    with rollout_server.client() as client:
        for rounds in (1, 3):  # the first brings what is loaded lazily
            before = rollout_server.memory_mib()
            with answering(rollout_server):
                for body in bodies * rounds:
                    response = client.post("/v1/rollouts", content=body)
                    assert (response.status_code, response.json()["title"]) == (413, "Over a limit")
        wait_until(lambda: rollout_server.memory_mib() - before < 16, 10.0)
        body = {"prompts": [[60]], "sampling": {"max_new_tokens": 2}}
        assert client.post("/v1/rollouts", json=body).status_code == 200


@pytest.mark.timeout(120)
def test_connections_that_bring_nothing_are_closed(rollout_server: Server) -> None:
    with rollout_server.client() as client:
        client.get("/health")
    before = num_descriptors(rollout_server)
    with ExitStack() as stack, answering(rollout_server):
        silent = [stack.enter_context(connection(rollout_server)) for _ in range(200)]
        for sock in silent[100:]:
            sock.sendall(b"POST /v1/rollouts HTTP/1.1\r\nhost: x\r\n")
        wait_until(lambda: num_descriptors(rollout_server) >= before + 200, 10.0)
        wait_until(lambda: num_descriptors(rollout_server) <= before + 2, BoundedConnection.headers_timeout_s + 5)
        assert {read_answer(sock)[0] for sock in silent} == {0}


@pytest.mark.parametrize("what", [b"\x00\x01\x02\r\n\r\n", b"GET /health HTTP/9.9\r\n\r\n", b"hello\r\n\r\n"])
def test_what_is_no_http_is_refused(what: bytes, rollout_server: Server) -> None:
    with connection(rollout_server) as sock:
        sock.sendall(what)
        assert read_answer(sock)[0] in (0, 400)
