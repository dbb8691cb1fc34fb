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
        self.forward_seconds = Histogram(documentation="Time of one forward pass.", **named("forward_seconds"))
        self.batch_fill = Histogram(
            documentation="Share of a forward pass's padded tokens that are tokens.",
            buckets=[0.1 * tenth for tenth in range(1, 11)],
            **named("batch_fill_ratio"),
        )
        self.wait_seconds = Histogram(
            documentation="Time from a request's acceptance to its first forward pass.", **named("wait_seconds")
        )
        self.queued_sequences = Gauge(
            documentation="Sequences that wait for a forward pass.", **named("queued_sequences")
        )
        self.pending = Gauge(documentation="Accepted requests without an answer.", **named("pending_requests"))
