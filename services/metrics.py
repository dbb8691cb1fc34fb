"""Prometheus metrics of the teacher server, in a registry of their own (vLLM has its own on the rollout server)."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class TeacherMetrics:
    """What the teacher counts; names follow Prometheus' conventions (base units, _total on counters)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def named(name: str) -> dict[str, Any]:
            return {"name": f"distillserve_teacher_{name}", "registry": self.registry}

        self.requests = Counter(
            documentation="Answered requests by route and status.", labelnames=["route", "status"], **named("requests")
        )
        self.rejected = Counter(
            documentation="Requests refused, by the title of their problem document.",
            labelnames=["reason"],
            **named("rejected"),
        )
        self.sequences = Counter(documentation="Scored sequences.", **named("sequences"))
        self.rows = Counter(documentation="Scored completion positions.", **named("rows"))
        self.tokens = Counter(documentation="Tokens of scored sequences, prompts included.", **named("tokens"))
        self.score_seconds = Histogram(documentation="Time in the engine per request.", **named("score_seconds"))
        self.wait_seconds = Histogram(documentation="Time a request waits for the engine.", **named("wait_seconds"))
        self.pending = Gauge(documentation="Accepted requests without an answer.", **named("pending_requests"))
