"""The ASGI middleware around vLLM's server: a key on every route, an allow-list, and our own routes.

vLLM's --api-key leaves its control and RPC routes open. So every request passes: key or 401, known path or 404, then our
own handler or vLLM's.
"""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from services.config.keys import Secrets, reveal
from services.config.own_key import publish_own_key
from services.errors import RequestError
from services.http.guard import OPEN_PATHS, Guard
from services.rollout import weights
from services.rollout.completions import create_rollouts, engine_of, get_info
from services.rollout.settings import RolloutSettings
from services.rollout.state import RolloutState

VLLM_ROUTES = frozenset({("GET", "/health"), ("GET", "/metrics")})

Handler = Callable[[Request, RolloutState], Awaitable[Response]]


async def get_ready(request: Request, state: RolloutState) -> Response:
    """`GET /ready`: 200 when the engine lives; vLLM accepts connections only once the model is loaded."""
    await engine_of(request).check_health()
    return JSONResponse({"status": "ready"})


OUR_ROUTES: dict[tuple[str, str], Handler] = {
    ("GET", "/ready"): get_ready,
    ("GET", "/v1/rollouts/info"): get_info,
    ("POST", "/v1/rollouts"): create_rollouts,
    **weights.ROUTES,
}


class AllowList:
    """Sends known requests to our handlers or on to vLLM, and answers 404 to all others."""

    def __init__(self, app: ASGIApp, state: RolloutState) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        route = (scope["method"], scope["path"])
        if route in OUR_ROUTES:
            response = await OUR_ROUTES[route](Request(scope, receive), self.state)
            await response(scope, receive, send)
        elif route in VLLM_ROUTES:
            await self.app(scope, receive, send)
        else:
            raise RequestError(404, "Not found", f"{route[0]} {route[1]} is not a route of the rollout server")


class RolloutGuard(Guard):
    """What vLLM gets as --middleware."""

    def __init__(self, app: ASGIApp) -> None:
        settings = RolloutSettings.from_environment()
        super().__init__(
            AllowList(app, RolloutState(settings)),
            # Made here, not before: this process has the port, so that no other server overwrites the file.
            key=reveal(Secrets().rollout_key) or publish_own_key(settings.port),
            open_paths=OPEN_PATHS,
            max_body_bytes=settings.max_body_bytes,
        )
