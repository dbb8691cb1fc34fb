"""A teacher of a real port whose answers are numbers worked out from the token ids, and can be spoilt by a test.

Text is tokenized into its bytes. The same sequence gets the same bits, whatever company it is in.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import numpy as np

from services.wire.teacher import TeacherInfo, TeacherScores, encode_scores

VOCAB = 261
INFO = TeacherInfo(
    protocol=1,
    model="scripted",
    fingerprint="f",
    vocab_size=VOCAB,
    padded_vocab_size=VOCAB,
    tokenizer_fingerprint="t",
    eos_token_ids=[256],
    chat_template_probe=None,
    dtype="float32",
    max_model_len=64,
    max_top_k=VOCAB,
    max_tokens_per_request=1 << 20,
    max_sequences_per_request=4096,
    max_answer_mib=512,
    temperature_support="any",
)


def token_ids_of(sequence: dict[str, Any]) -> tuple[list[int], int]:
    """(token ids, length of the prompt) of a sequence in any form."""
    if "token_ids" in sequence:
        return sequence["token_ids"], sequence["prompt_length"]
    if "messages" in sequence:
        *before, last = (list(m["content"].encode()) for m in sequence["messages"])
        prompt, completion = [i for ids in before for i in ids], last
    else:
        prompt, completion = (list(sequence[name].encode()) for name in ("prompt", "completion"))
    return [*prompt, *completion], len(prompt)


def logprobs_of(token_ids: list[int], prompt_length: int, temperature: float) -> np.ndarray:
    """[rows, VOCAB] of a distribution that depends on the two tokens before."""
    rows = []
    for position in range(prompt_length, len(token_ids)):
        seed = token_ids[max(0, position - 2) : position]
        logits = np.random.default_rng(seed).normal(0, 3, VOCAB) / temperature
        rows.append(logits - np.log(np.exp(logits).sum()))
    return np.array(rows).reshape(-1, VOCAB)


def scores_of(body: dict[str, Any]) -> TeacherScores:
    """A good answer."""
    sequences = [token_ids_of(s) for s in body["sequences"]]
    dense = np.concatenate([logprobs_of(ids, length, body["temperature"]) for ids, length in sequences])
    scored = np.concatenate([np.array(ids[length:], np.int32) for ids, length in sequences])
    order = np.argsort(-dense, axis=1, kind="stable")
    ids, rest = order[:, : body["top_k"]], order[:, body["top_k"] :]
    dtype = body.get("logprob_dtype", "float32")
    with np.errstate(divide="ignore"):
        tails = np.log(np.exp(np.take_along_axis(dense, rest, 1)).sum(1))
    return TeacherScores(
        model="scripted",
        fingerprint="f",
        temperature=body["temperature"],
        top_k=body["top_k"],
        row_offsets=np.cumsum([0, *(len(ids) - length for ids, length in sequences)]),
        token_ids=scored,
        token_logprobs=dense[np.arange(len(dense)), scored].astype(dtype),
        topk_ids=ids.astype(np.int32),
        topk_logprobs=np.take_along_axis(dense, ids, 1).astype(dtype),
        tail_logprobs=tails.astype(dtype),
        entropies=(-np.exp(dense) * dense).sum(1).astype(np.float32),
    )


class ScriptedTeacher:
    """What the server on `url` answers, and what it was asked.

    Attributes:
        spoil: changes a good answer.
        refuse: (status, problem) instead of an answer, or None; with status 0 the connection is closed without one.
        headers: of a refusal, e.g. Retry-After.
        delay_s: before each answer.
        info: of /v1/teacher/info.
    """

    def __init__(self, port: int = 0) -> None:
        self.spoil: Callable[[TeacherScores], TeacherScores] = lambda scores: scores
        self.refuse: Callable[[dict[str, Any]], tuple[int, dict[str, Any]] | None] = lambda body: None
        self.headers: dict[str, str] = {}
        self.delay_s = 0.0
        self.info = INFO
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                teacher.keys.add(self.headers["Authorization"])
                vocabulary = {chr(i) if i < 256 else f"<{i}>": i for i in range(VOCAB)}
                answers = {"/v1/teacher/info": teacher.info.model_dump(), "/v1/teacher/vocabulary": vocabulary}
                self._answer(200, json.dumps(answers.get(self.path, {})).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                teacher.bodies.append(body)
                time.sleep(teacher.delay_s)
                if (refusal := teacher.refuse(body)) is not None:
                    return self._refuse(*refusal)
                scores = replace(scores_of(body), model=teacher.info.model, fingerprint=teacher.info.fingerprint)
                return self._answer(200, encode_scores(teacher.spoil(scores)))

            def _refuse(self, status: int, problem: dict[str, Any]) -> None:
                if status == 0:
                    self.close_connection = True
                else:
                    self._answer(status, json.dumps(problem).encode(), teacher.headers)

            def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def num_asked(self) -> int:
        """Sequences of all requests so far."""
        return sum(len(body["sequences"]) for body in self.bodies)

    @contextmanager
    def serving(self) -> Iterator["ScriptedTeacher"]:
        thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()
