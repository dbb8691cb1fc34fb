"""A plain `vllm serve` as a teacher: what TeacherClient does, over vLLM's OpenAI API; loads neither torch nor vllm.

Only at temperature 1 and with the teacher's own top-k: vLLM computes prompt logprobs before temperature, and its OpenAI
API scores no tokens of the caller's choice. An answer is JSON of about 70 bytes a candidate, rows of the prompt included
(ours: 8, completion alone), and says nothing of entropies (NaN) and no more of the tail than services/wire/tail.py.
"""

import asyncio
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from pydantic import BaseModel, ValidationError

from services.clients import TeacherClient
from services.clients.teacher_answers import TokenIdsAndPromptLength
from services.errors import InputError, PeerError, ProblemError, UnreadableAnswerError
from services.wire.message import PROTOCOL_VERSION
from services.wire.tail import log_mass_left
from services.wire.teacher import TeacherInfo, TeacherScores

# How vLLM refuses a request: a sequence that is too long, or an id that is none.
_REFUSALS = (400, 413, 422)
# vLLM writes this for minus infinity, which JSON has no word for.
_MINUS_INFINITY = -9999.0
# How vLLM refuses to report the whole vocabulary: how many tokens that is, and how many it would report.
_TOO_MANY = re.compile(r"logprobs of (\d+), which is greater than max allowed: (\d+)")
_NO_LIMIT = 1 << 31


@dataclass(frozen=True)
class TeacherTokens:
    """What vLLM does not say of its tokenizer, from the folder of the teacher's model."""

    tokenizer_fingerprint: str
    eos_token_ids: list[int]
    chat_template_probe: str | None
    vocabulary: dict[str, int]
    chat_template_hash: str | None = None


class _Model(BaseModel):
    id: str
    max_model_len: int


class VllmTeacherClient(TeacherClient):
    """Stock vLLM servers, equal replicas.

    Args:
        urls: their base URLs, without /v1.
        tokens: what is known of the teacher's tokenizer; without it `info` says that it is unknown.
        options: as of ServerClient.
    """

    _READY_PATH = "/health"
    _SERVER = "a plain `vllm serve`, which teacher_client.protocol = vllm promises"
    # Some MiB of JSON with the usual top-k.
    _MOST_ROWS_PER_REQUEST = 2048

    def __init__(self, urls: list[str], *, tokens: TeacherTokens | None = None, **options: Any) -> None:
        super().__init__(urls, **options)
        self._tokens = tokens
        self._infos: dict[str, TeacherInfo] = {}

    async def vocabulary(self) -> dict[str, int]:
        """The teacher's token-to-id map.

        Raises:
            PeerError: its tokenizer is not known here.
        """
        if self._tokens is None:
            raise PeerError(f"{self.urls[0]} does not tell its vocabulary")
        return self._tokens.vocabulary

    def _check_askable(self, sequences: list[dict[str, Any]], settings: dict[str, Any]) -> None:
        """Refuse what a plain vLLM server does not do, and what it would answer without a row.

        Raises:
            PeerError: another temperature than 1, support_ids, text, or float16.
            InputError: a sequence without a prompt or without a completion.
        """
        what = f"temperature = {settings['temperature']}" if settings["temperature"] != 1.0 else None
        what = f"logprob_dtype = {settings['logprob_dtype']}" if "logprob_dtype" in settings else what
        for index, sequence in enumerate(sequences):
            if sequence.get("support_ids") is not None:
                what = "support_ids"
            elif sequence.get("token_ids") is None:
                what = f"sequences.{index}, a text,"
            else:
                _check_completion(index, sequence)
        if what is not None:
            raise PeerError(
                f"{what} cannot be asked of {self.urls[0]}: a plain vLLM server scores its top-k for token ids at 1 only"
            )

    def _may_be_cut(self, error: ProblemError) -> bool:
        """vLLM refuses a request as a whole for one of its sequences, and does not say for which."""
        return error.status in _REFUSALS and _TOO_MANY.search(str(error)) is None

    async def _info(self, url: str) -> TeacherInfo:
        if url not in self._infos:
            self._infos[url] = await self._describe(url)
        return self._infos[url]

    async def _describe(self, url: str) -> TeacherInfo:
        response = await self._send("GET", f"{url}/v1/models")
        try:
            model = _Model.model_validate(response.json()["data"][0])
        except (ValueError, LookupError, TypeError, ValidationError) as error:
            problem = "no list of models as of vLLM; see teacher_client.protocol"
            raise UnreadableAnswerError(f"{url}/v1/models", problem, response.content) from error
        vocab_size, max_top_k = await self._limits(url, model.id)
        tokens = self._tokens
        return TeacherInfo(
            protocol=PROTOCOL_VERSION,
            model=model.id,
            fingerprint=hashlib.sha256(f"{model.id} {vocab_size}".encode()).hexdigest()[:16],
            vocab_size=vocab_size,
            padded_vocab_size=vocab_size,
            tokenizer_fingerprint=tokens.tokenizer_fingerprint if tokens else None,
            eos_token_ids=tokens.eos_token_ids if tokens else [],
            chat_template_probe=tokens.chat_template_probe if tokens else None,
            chat_template_hash=tokens.chat_template_hash if tokens else None,
            dtype="unknown",
            max_model_len=model.max_model_len - 1,  # vLLM samples a token, which needs room
            max_top_k=max_top_k,
            max_tokens_per_request=_NO_LIMIT,
            max_sequences_per_request=_NO_LIMIT,
            max_answer_mib=_NO_LIMIT,
            temperature_support="one",
            engine="vllm serve",
            server="vllm",
            scores_support_ids=False,
            computes_entropies=False,
        )

    async def _limits(self, url: str, model: str) -> tuple[int, int]:
        """(vocabulary, largest top-k), which no route tells: the answer, or the refusal, of asking for everything."""
        try:
            response = await self._complete(url, model, [[0, 0]], -1)
        except ProblemError as error:
            found = _TOO_MANY.search(str(error))
            if found is None:
                raise
            return int(found[1]), int(found[2])
        (row,) = _rows(url, response.content, [([0, 0], 1)])[0]
        if row is None:
            raise PeerError(f"{url} reported no candidates at all for a token")
        return len(row), len(row)

    async def _complete(self, url: str, model: str, prompts: list[list[int]], top_k: int) -> httpx.Response:
        body = {"model": model, "prompt": prompts, "prompt_logprobs": top_k, "max_tokens": 1, "temperature": 0.0}
        return await self._send("POST", f"{url}/v1/completions", json=body)

    async def _ask(self, url: str, body: dict[str, Any]) -> TeacherScores:
        sequences = [(s["token_ids"], s["prompt_length"]) for s in body["sequences"]]
        info = await self._info(url)
        response = await self._complete(url, info.model, [ids for ids, _ in sequences], body["top_k"])
        scores = await asyncio.to_thread(read_scores, url, response.content, sequences, body["top_k"], info)
        self._check_same_model(url, scores)
        return scores

    async def _ask_info(self, url: str) -> TeacherInfo:
        self._infos.pop(url, None)
        return await self._info(url)


def _check_completion(index: int, sequence: dict[str, Any]) -> None:
    length, total = sequence.get("prompt_length"), len(sequence["token_ids"])
    if length is None or not 1 <= length < total:
        raise InputError(
            f"sequences.{index}: prompt_length = {length} of {total} token ids must leave one to score, and at least one before it"
        )


def read_scores(
    url: str, content: bytes, sequences: list[TokenIdsAndPromptLength], top_k: int, info: TeacherInfo
) -> TeacherScores:
    """The answer of /v1/completions as ours.

    Raises:
        PeerError: it is not one, or lacks rows or candidates.
    """
    token_logprobs, topk_ids, topk_logprobs = [], [], []
    for (ids, prompt_length), rows in zip(sequences, _rows(url, content, sequences), strict=True):
        for token, row in zip(ids[prompt_length:], rows, strict=True):
            if row is None:  # one sample's loss: what is no number is set aside by whoever trains on it
                row = dict.fromkeys((token, *(i for i in range(top_k + 1) if i != token)), np.nan)
            if token not in row or not top_k <= len(row) <= top_k + 1:
                raise PeerError(f"{url} reported {len(row)} candidates for a token, expected it and the top {top_k}")
            token_logprobs.append(row[token])
            if len(row) > top_k:  # else it is one of them
                del row[token]
            ranked = sorted(row.items(), key=lambda entry: (-entry[1], entry[0]))
            topk_ids.append([i for i, _ in ranked])
            topk_logprobs.append([logprob for _, logprob in ranked])
    topk = np.asarray(topk_logprobs, np.float32)
    tails = log_mass_left(topk) if top_k < info.padded_vocab_size else np.full(len(topk), -np.inf)
    return TeacherScores(
        model=info.model,
        fingerprint=info.fingerprint,
        temperature=1.0,
        top_k=top_k,
        row_offsets=np.cumsum([0, *(len(ids) - length for ids, length in sequences)], dtype=np.int64),
        token_ids=np.concatenate([ids[length:] for ids, length in sequences]).astype(np.int32),
        token_logprobs=np.asarray(token_logprobs, np.float32),
        topk_ids=np.asarray(topk_ids, np.int32),
        topk_logprobs=topk,
        tail_logprobs=tails.astype(np.float32),
        entropies=np.full(len(topk), np.nan, np.float32),
    )


def _rows(url: str, content: bytes, sequences: list[TokenIdsAndPromptLength]) -> list[list[dict[int, float] | None]]:
    """Of each sequence, {token: logprob} at every row: the token that is there, and the likeliest ones; None for null."""
    try:
        choices = sorted(json.loads(content)["choices"], key=lambda choice: choice["index"])
        positions = [choice["prompt_logprobs"] for choice in choices]
        if [len(p) for p in positions] != [len(ids) for ids, _ in sequences]:
            raise PeerError(f"{url} did not report the logprobs of every token that it was asked for")
        return [
            [
                None if row is None else {int(token): _logprob(entry) for token, entry in row.items()}
                for row in part[prompt_length:]
            ]
            for part, (_, prompt_length) in zip(positions, sequences, strict=True)
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"no answer of vLLM's /v1/completions with prompt_logprobs: {error!r}"
        raise UnreadableAnswerError(url, problem, content) from error


def _logprob(entry: dict[str, Any]) -> float:
    value = np.nan if entry["logprob"] is None else float(entry["logprob"])
    return -np.inf if value <= _MINUS_INFINITY else value
