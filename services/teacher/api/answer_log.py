"""What is kept of every answered request: a count by route and status, and a line of log."""

import logging

from starlette.types import Scope

from services.config import TeacherConfig
from services.http.metrics import TeacherMetrics

logger = logging.getLogger(__name__)

SCORED = "distillserve.scored"
"""Key of the scope under which a route says what it scored, for the log."""

# Asked every few seconds by machines.
_QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics"})
_SHOWN_CHARACTERS = 200


class AnswerLog:
    """Called with the scope, the status and the duration of each request, refused ones included."""

    def __init__(self, config: TeacherConfig, metrics: TeacherMetrics) -> None:
        self._access_log, self._metrics = config.access_log, metrics

    def __call__(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        # Paths of the caller's choice would make endless label values.
        path = route.path if route is not None else "(unknown)"
        self._metrics.requests.labels(path, status).inc()
        level = self._level(path, status)
        if not logger.isEnabledFor(level):
            return
        fields = {
            "method": scope["method"],
            # As it was sent, percent signs and all, so that no path can write a line of its own; without the query.
            "path": scope.get("raw_path", b"").decode("ascii", "replace")[:_SHOWN_CHARACTERS],
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            "client": (scope.get("client") or ("unknown",))[0],
            **scope.get(SCORED, {}),
        }
        logger.log(level, "%s", " ".join(f"{name}={value}" for name, value in fields.items()), extra=fields)

    def _level(self, route: str, status: int) -> int:
        if route in _QUIET_ROUTES:
            return logging.DEBUG  # a 503 of /ready is no fault: the model is being loaded
        if status >= 500:
            return logging.WARNING
        return logging.INFO if status >= 400 or self._access_log else logging.DEBUG
