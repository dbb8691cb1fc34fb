"""The JSON documents that the teacher answers with, as `GET /openapi.json` describes them; requests are services/wire/teacher.py's."""

from pydantic import BaseModel, ConfigDict


class Documented(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Problem(Documented):
    """Why a request was not answered (RFC 9457)."""

    type: str
    title: str
    """The kind of problem, always in the same words."""
    status: int
    detail: str
    """What was wrong with this request, and what would be right."""
    request_id: str
    """The X-Request-ID of this answer."""
    field: str | None = None
    """Dotted path of the offending field, or the name of the offending header; absent where there is none."""


class ScoredSequence(Documented):
    """Scores of one sequence; lists have one entry per completion token ("row"). null: no finite number."""

    token_ids: list[int]
    """The scored tokens: of a text, how it was tokenized."""
    token_logprobs: list[float | None]
    """Logprob of each scored token, nats."""
    topk_ids: list[list[int]]
    """[rows][K] likeliest tokens, by falling logprob, equal ones by rising id."""
    topk_logprobs: list[list[float | None]]
    """[rows][K]"""
    tail_logprobs: list[float | None]
    """Log of the mass outside the top-k; null: there is none."""
    entropies: list[float | None]
    """Nats; null: this engine computes none."""
    support_logprobs: list[list[float | None]] | None = None
    """[rows][M] logprobs of support_ids; absent without them."""
    support_tail_logprobs: list[float | None] | None = None
    """Log of the mass outside support_ids; absent without them."""


class ScoreAnswer(Documented):
    """The scores of a request; names may be added within protocol 1."""

    protocol: int
    model: str
    fingerprint: str
    """Equal for replicas."""
    temperature: float
    top_k: int
    sequences: list[ScoredSequence]
    """In the order of the request."""
