"""What the teacher server is asked for, and what it answers."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, StrictInt, model_validator

from services.errors import PeerError
from services.wire.conversation import Messages, Tools
from services.wire.document import decode_document, encode_document
from services.wire.message import PROTOCOL_VERSION, TokenIds, WireModel

MODEL_DIGITS = 10
"""Of a fingerprint: those that say which model it is; the rest says how its logits are computed."""
BYTES_PER_CANDIDATE = 8
"""Of an answer of the teacher: an int32 id and a float32 logprob."""


class TeacherSequence(WireModel):
    """One sequence to score: token ids with a prompt length, or text for people.

    Row i scores `token_ids[prompt_length + i]` given everything before it; prompt rows are never scored.
    Give exactly one of: token_ids + prompt_length; prompt + completion; messages (the last one is scored).
    """

    token_ids: TokenIds | None = None
    """Ids of prompt and completion: at most max_model_len, each below padded_vocab_size (/v1/teacher/info)."""
    prompt_length: StrictInt | None = Field(None, ge=1)
    """Tokens of token_ids that are not scored; at least one is left."""
    support_ids: Annotated[list[TokenIds], Field(fail_fast=True)] | None = None
    """[rows][M] further token ids to score at each row."""
    prompt: str | None = None
    """Text that is not scored, tokenized with the tokenizer's BOS, if it has one."""
    completion: str | None = None
    """Text that is scored, tokenized behind the prompt, up to its first end token."""
    messages: Messages | None = None
    """A conversation, rendered by the chat template; the assistant's last message is scored, up to its end token."""
    tools: Tools = None
    """What the assistant of messages may call: a list of objects, or one as JSON text; rendered by the chat template."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt_length is not None and self.token_ids is None:
            raise ValueError("prompt_length belongs to token_ids; of text, the prompt is what is not scored")
        if self.tools is not None and self.messages is None:
            raise ValueError("tools belong to messages: the chat template renders them")
        return self


class TeacherRequest(WireModel):
    """`POST /v1/teacher/logprobs`."""

    sequences: Annotated[list[TeacherSequence], Field(fail_fast=True)] = Field(min_length=1)
    """At most max_sequences_per_request, together max_tokens_per_request tokens (/v1/teacher/info)."""
    top_k: StrictInt = Field(ge=1)
    """Likeliest tokens to return at each row, at most max_top_k (/v1/teacher/info)."""
    temperature: float = Field(1.0, ge=0.01, le=100, allow_inf_nan=False, strict=True)
    """Divides the logits before the softmax, exactly."""
    logprob_dtype: Literal["float32", "float16"] = "float32"
    """Dtype of logprobs in the binary answer."""


class TeacherInfo(WireModel):
    """`GET /v1/teacher/info`: what a client must know before it scores."""

    protocol: int
    model: str
    fingerprint: str
    """Hash of configuration, weights and tokenizer, then of engine, dtype and options: servers with the same fingerprint are
    replicas, wherever their copies lie."""
    vocab_size: int
    """Token ids the tokenizer can produce."""
    padded_vocab_size: int
    """Rows of the output embedding; at least vocab_size."""
    tokenizer_fingerprint: str | None
    """Hash of the token-to-id map and of the encoding of a probe text, padding of the embedding left out; null: unknown."""
    eos_token_ids: list[int]
    chat_template_probe: str | None
    """A fixed conversation as the chat template renders it on a fixed day; null without a template."""
    dtype: str
    max_model_len: int
    max_top_k: int
    max_tokens_per_request: int
    max_sequences_per_request: int
    max_answer_mib: int
    temperature_support: Literal["any", "one"]
    """"one": this engine cannot apply a temperature other than 1."""
    engine: str = "transformers"
    """What runs the forward pass."""
    scores_support_ids: bool = True
    """Whether this engine scores further tokens, support_ids."""
    computes_entropies: bool = True
    """Whether entropies are numbers; else they are NaN, in JSON null."""
    chat_template_hash: str | None = None
    """Of the chat template's source and the special tokens that it may use; null: unknown, or none."""
    server: Literal["distillserve", "vllm"] = "distillserve"
    """What answers, as teacher_client.protocol says it; "vllm": a plain `vllm serve`, of which this is what can be found out."""


SCORE_COLUMNS = (
    "token_ids",
    "token_logprobs",
    "topk_ids",
    "topk_logprobs",
    "tail_logprobs",
    "entropies",
    "support_logprobs",
    "support_tail_logprobs",
)
"""The arrays of TeacherScores that hold R rows."""


@dataclass(frozen=True)
class TeacherScores:
    """Scores of all rows of a request, sequence b owning rows row_offsets[b]:row_offsets[b+1]; R rows, K candidates."""

    model: str
    fingerprint: str
    temperature: float
    top_k: int
    row_offsets: np.ndarray  # [B+1] int64
    token_ids: np.ndarray  # [R] int32, the scored tokens: what was asked, or what text became
    token_logprobs: np.ndarray  # [R] logprob of the scored token
    topk_ids: np.ndarray  # [R, K] int32, by falling logprob
    topk_logprobs: np.ndarray  # [R, K]
    tail_logprobs: np.ndarray  # [R] log of the mass outside the top-k, -inf when K covers the vocabulary
    entropies: np.ndarray  # [R] nats, NaN where the engine does not compute them
    support_logprobs: np.ndarray | None = None  # [R, M] logprobs of support_ids
    support_tail_logprobs: np.ndarray | None = None  # [R] log of the mass outside support_ids

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays that hold R rows, by name; those of support_ids only where these were asked for."""
        return {name: array for name in SCORE_COLUMNS if (array := getattr(self, name)) is not None}

    def metadata(self) -> dict[str, Any]:
        """What both encodings say of the answer as a whole."""
        return {
            "protocol": PROTOCOL_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "temperature": self.temperature,
            "top_k": self.top_k,
        }


_SCORE_FIELDS = frozenset(field.name for field in fields(TeacherScores))


def encode_scores(scores: TeacherScores) -> bytes:
    """The binary answer of `POST /v1/teacher/logprobs`."""
    return encode_document({"row_offsets": scores.row_offsets, **scores.columns()}, scores.metadata())


def decode_scores(document: bytes) -> TeacherScores:
    """Inverse of `encode_scores`; names that a later server added are left out.

    Raises:
        PeerError: the document is not an answer of protocol 1.
    """
    arrays, metadata = decode_document(document)
    protocol = metadata.pop("protocol", None)
    if protocol != PROTOCOL_VERSION:
        raise PeerError(f"the teacher answered in protocol {protocol!r}, this client speaks {PROTOCOL_VERSION}")
    try:
        known: dict[str, Any] = {name: value for name, value in {**arrays, **metadata}.items() if name in _SCORE_FIELDS}
        return TeacherScores(**known)
    except TypeError as error:
        raise PeerError(f"the answer lacks fields: {error}") from error
