"""The rollout server's own routes in this process, on a port, with an engine that does what a test tells it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import uvicorn
from vllm.logprobs import FlatLogprobs

from services.http.bounded_connection import BoundedConnection
from services.http.guard import OPEN_PATHS, Guard
from services.rollout.middleware import AllowList
from services.rollout.settings import RolloutSettings
from services.rollout.state import RolloutState

LIMITS: dict[str, Any] = {"max_logprobs": 64, "max_completions_per_request": 8192, "max_body_bytes": 64 << 20}


@dataclass
class SlowEngine:
    """Repeats the prompt's first token, after `seconds`."""

    seconds: float = 0.0
    top_k: int = 0
    num_tokens: int = 1
    running: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)
    model_config: Any = field(
        default_factory=lambda: SimpleNamespace(
            dtype="torch.float32", max_model_len=1 << 20, get_vocab_size=lambda: 1 << 18
        )
    )

    async def check_health(self) -> None:
        return None

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self.running.add(request_id)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.aborted.add(request_id)
            raise
        finally:
            self.running.discard(request_id)
        ids = [prompt["prompt_token_ids"][0]] * self.num_tokens
        width = self.num_tokens * (params.logprobs + 1)
        flat = FlatLogprobs(token_ids=[1] * width, logprobs=[-1.0] * width)
        answer = SimpleNamespace(token_ids=ids, logprobs=flat, finish_reason="length", weight_versions=[])
        yield SimpleNamespace(finished=True, outputs=[answer])


@dataclass
class Serving:
    url: str
    state: RolloutState
    server: uvicorn.Server

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)


@asynccontextmanager
async def serving(
    engine: SlowEngine, connection: type[BoundedConnection] = BoundedConnection, **settings: Any
) -> AsyncIterator[Serving]:
    """Args: settings: of the server, instead of LIMITS and defaults."""
    state = RolloutState(RolloutSettings("m", "gloo", **(LIMITS | settings)))
    routes = AllowList(_unknown, state)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
        await routes(scope, receive, send)

    guard = Guard(app, key=None, open_paths=OPEN_PATHS, max_body_bytes=state.settings.max_body_bytes)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    options = uvicorn.Config(
        guard, http=connection, log_config=None, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(options)
    running = asyncio.create_task(server._serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield Serving(f"http://127.0.0.1:{listener.getsockname()[1]}", state, server)
    finally:
        server.should_exit = server.force_exit = True
        await running


async def _unknown(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("vLLM is asked for nothing here")
