"""The health check asks the server itself, whatever proxies the environment names."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from services.process.startup import free_port

SCRIPT = Path(__file__).parents[3] / "docker" / "is_ready.py"
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(vars(self.server)["answer"] if self.path == "/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def check(port: int) -> int:
    environment = {**os.environ, **dict.fromkeys(PROXIES, f"http://127.0.0.1:{free_port('127.0.0.1', 0)}")}
    environment.pop("no_proxy", None), environment.pop("NO_PROXY", None)
    done = subprocess.run([sys.executable, str(SCRIPT), str(port)], env=environment, capture_output=True, timeout=30)
    assert not done.stderr
    return done.returncode


@pytest.mark.parametrize(("answer", "code"), [(200, 0), (503, 1), (404, 1)])
def test_it_says_what_the_server_says(server: Any, answer: int, code: int) -> None:
    server.answer = answer
    assert check(server.server_port) == code


def test_no_server_is_not_ready() -> None:
    assert check(free_port("127.0.0.1", 0)) == 1
