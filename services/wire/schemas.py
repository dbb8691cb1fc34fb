"""The wire types of both servers: what is asked, what is answered, under one name from wire to loss.

Requests are pydantic models (JSON in); answers that carry arrays are dataclasses of numpy arrays with the
codec in `services.wire.codec`. Loads neither torch nor vllm.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, field_validator, model_validator

from services.strict_json import parse_json

PROTOCOL_VERSION = 1
MODEL_DIGITS = 10
"""Of a fingerprint: those that say which model it is; the rest says how its logits are computed."""
BYTES_PER_CANDIDATE = 8
"""Of an answer of the teacher: an int32 id and a float32 logprob."""

TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
# A list is given up at its first wrong item: one error object for each of a million items would cost gigabytes.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]

# Unknown keys that are reported one by one; more are refused as a whole, for the same reason.
_MAX_UNKNOWN_KEYS = 16


class WireModel(BaseModel):
    """Base of everything that arrives over HTTP: unknown fields are refused, not ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_many_keys(cls, data: Any) -> Any:
        limit = len(cls.model_fields) + _MAX_UNKNOWN_KEYS
        if isinstance(data, dict) and len(data) > limit:
            raise ValueError(f"an object with {len(data)} keys, only {len(cls.model_fields)} are known")
        return data


RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]

_LABEL = re.compile(r"(0|[1-9][0-9]{0,17})\.([1-9][0-9]{0,8})@([A-Za-z0-9_-]{1,64})")


@dataclass(frozen=True)
class PolicyLabel:
    """What a server calls the weights of one push: "5.1@3f9c2a1b" is version 5 of the run 3f9c2a1b, at its first attempt.

    Tokens that were sampled under a push that failed later, or under the version 5 of another run, are so told apart.
    """

    version: int
    attempt: int
    run: str

    def __str__(self) -> str:
        return f"{self.version}.{self.attempt}@{self.run}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Inverse of `str`.

        Raises:
            ValueError: the text is no label; "default" is none either.
        """
        found = _LABEL.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no version of a run, which looks like 5.1@3f9c2a1b")
        return cls(int(found[1]), int(found[2]), found[3])


# ---------------------------------------------------------------------------------------------- rollouts


class RolloutSampling(WireModel):
    """How to complete; temperature 0 is greedy."""

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = None
    """Seed of this request's completions; without it the server's own sampler state is used."""


class RolloutRequest(WireModel):
    """`POST /v1/rollouts`: a batch of prompts, completed `samples_per_prompt` times each."""

    prompts: Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(fail_fast=True)] = Field(min_length=1)
    """Token ids of each prompt."""
    samples_per_prompt: int = Field(1, ge=1)
    sampling: RolloutSampling
    student_top_k: int = Field(0, ge=0)
    """Also return the student's k likeliest tokens at every position; 0 is off."""
    run: RunId | None = None
    """The run that wants to train on them: refused (409) unless it holds the server. Without one anybody may sample."""


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled under `policy_version`, a PolicyLabel ("default": never pushed to)."""

    policy_version: str
    start: int
    end: int


@dataclass(frozen=True)
class RolloutCompletion:
    """One frame of the answer of `POST /v1/rollouts`; T is the number of sampled tokens."""

    prompt_index: int
    sample_index: int
    token_ids: np.ndarray  # [T] int32, the sampled tokens, the end token included
    rollout_logprobs: np.ndarray  # [T] float32, logprob of token_ids under the policy that sampled
    finish_reason: Literal["stop", "length", "abort"]
    policy_versions: list[VersionSpan]
    student_topk_ids: np.ndarray | None = None  # [T, K] int32, without the appended sampled token
    student_topk_logprobs: np.ndarray | None = None  # [T, K] float32

    @property
    def truncated(self) -> bool:
        """Whether the completion hit max_new_tokens instead of ending by itself."""
        return self.finish_reason == "length"


class RolloutInfo(WireModel):
    """`GET /v1/rollouts/info`: what a trainer must know before it attaches."""

    protocol: int
    model: str
    boot_id: str
    """New at every start of the server, so that a restart is recognised."""
    policy_version: str
    """A PolicyLabel; "default" until the first push."""
    dtype: Literal["float32", "bfloat16", "float16"]
    max_model_len: int = Field(ge=2)
    vocab_size: int = Field(ge=1)
    max_logprobs: int
    world_size: int = Field(ge=1)
    """Processes that receive weights: tensor x pipeline x data parallel."""
    weight_transfer_backend: str
    gpu_uuids: list[str] = []
    """Of the cards it runs on, e.g. "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"; none on a CPU."""
    max_completions_per_request: int = Field(8192, ge=1)
    """Largest prompts times samples of one request."""


# ----------------------------------------------------------------------------------------------- weights


class WeightCall(WireModel):
    """What every `POST /v1/weights/...` says: the run that holds the server."""

    run: RunId


class HoldRequest(WeightCall):
    """`POST /v1/weights/hold`: take the server for a run, or renew its lease."""

    name: str = Field(min_length=1, max_length=300)
    """What a person knows the run by."""
    lease_s: float = Field(gt=0, le=3600, allow_inf_nan=False)
    """Silence after which the run counts as gone, seconds."""
    take_over: bool = False
    """Take it from a run that lives."""


class ConnectRequest(WeightCall):
    """`POST /v1/weights/connect`: join the trainer's group."""

    rendezvous: dict[str, Any]
    timeout_s: float = Field(gt=0, allow_inf_nan=False)
    """Deadline of this and of every later stage, seconds."""


class PauseRequest(WeightCall):
    """`POST /v1/weights/pause`: admit no more completions, wait for those in flight."""

    drain_s: float = Field(gt=0, allow_inf_nan=False)
    """How long to wait for them, seconds."""


class ReceiveRequest(WeightCall):
    """`POST /v1/weights/receive`: receive and load one push; answers what each worker got."""

    update: dict[str, Any]


class FinishRequest(WeightCall):
    """`POST /v1/weights/finish`: the weights are whole, and called `label` from now on."""

    label: str

    @field_validator("label")
    @classmethod
    def _check(cls, label: str) -> str:
        PolicyLabel.parse(label)
        return label


class CanaryRequest(WeightCall):
    """`POST /v1/weights/canary`: score given tokens under the new weights, before anybody samples under them."""

    sequences: Annotated[list[Annotated[TokenIds, Field(min_length=2)]], Field(fail_fast=True)] = Field(min_length=1)


class CanaryScores(WireModel):
    """Its answer."""

    policy_version: str
    """The label under which each engine scored."""
    token_logprobs: list[list[list[float]]]
    """For each data-parallel engine and sequence, the logprobs of all its tokens but the first."""


# ----------------------------------------------------------------------------------------------- teacher


class ChatMessage(BaseModel):
    """One message of a conversation. Further fields (reasoning_content, name, ...) are the chat template's to read."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True, protected_namespaces=())

    role: str
    """What the chat template knows: mostly system, user, assistant, tool."""
    content: str | None = None
    """Text; null or absent beside tool_calls."""
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    """What the assistant calls, as the chat template takes it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content must be text; it may be absent beside tool_calls alone")
        return self

    def for_template(self) -> dict[str, Any]:
        """Its fields; null, with which datasets fill up what a message does not have, is absent."""
        return {name: value for name, value in self if value is not None}


def _parse_tools(tools: Any) -> Any:
    """A list as JSON text is that list: columns of datasets have one type each, the parameters of tools have not."""
    tools = parse_json(tools) if isinstance(tools, str) else tools
    return None if tools == [] else tools


Messages = Annotated[list[ChatMessage], Field(fail_fast=True)]
Tools = Annotated[
    Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None,
    BeforeValidator(_parse_tools, json_schema_input_type=list[dict[str, Any]] | str | None),
]


class Conversation(WireModel):
    """What a chat template renders."""

    messages: Messages = Field(min_length=1)
    tools: Tools = None


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
