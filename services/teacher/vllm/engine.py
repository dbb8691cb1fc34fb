"""The teacher's forward passes in vLLM: for models that need its tensor or pipeline parallelism or its quantisation.

consumes   ScoreJobs
produces   their answers, read out of vLLM's prompt logprobs
waits for  vLLM, which forms its batches by itself, in processes of its own
unblocked  by `submit`, on an event loop of its own: vLLM's client must not hold up /health, nor the other way round

What vLLM does not report: logprobs at another temperature (it computes them before temperature), entropies (NaN), and
the mass outside the top-k but as one minus the mass inside, which rounding drowns below 1e-6. Tokens
of the caller's choice are scored by its V2 model runner alone, which runs on GPUs. It computes and sends the rows of the
prompt too; they are dropped here. Prefix caching has no part in it: vLLM does not read its cache for requests that ask
for prompt logprobs.

The only module of the teacher that imports vLLM, and imported only when `teacher.engine = vllm`.
"""

import asyncio
import difflib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from services.config import TeacherConfig
from services.errors import DistillServeError, StartupError
from services.gpus.options import ALONE_UTILIZATION
from services.http.metrics import TeacherMetrics
from services.models.causal_lm import load_tokenizer
from services.models.shape import read_shape
from services.models.vllm_environment import float32_head, kv_cache_bytes
from services.process.startup import check_socket_folder
from services.teacher.jobs import ScoreItem, ScoreJob, engine_failed, shutting_down
from services.teacher.vllm.info import describe, longest_sequence
from services.wire.tail import log_mass_left

logger = logging.getLogger(__name__)

_POLL_S = 0.5
# How long vLLM's processes may finish what they hold when a signal reaches the whole process group, seconds.
_DRAIN_S = 60


class VllmScorer:
    """Scores sequences with vLLM.

    Args:
        metrics: receives the number of sequences that wait.
        on_failure: told when vLLM does not work any more; nothing is scored after that.

    Raises:
        StartupError: the model cannot be loaded.
    """

    def __init__(self, config: TeacherConfig, metrics: TeacherMetrics, on_failure: Callable[[Exception], None]) -> None:
        self._metrics, self._on_failure = metrics, on_failure
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            config.model or "", trust_remote_code=config.trust_remote_code, key="teacher.model"
        )
        self._tasks: dict[ScoreJob, asyncio.Task[None]] = {}
        self._closed = False
        self._speed = _Speed()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-vllm", daemon=True)
        self._thread.start()
        self._engine: Any = None
        try:
            self._engine = self._on_loop(_started(config))
            vllm_config = self._engine.vllm_config
            self.info = describe(
                config,
                self.tokenizer,
                vocab_size=vllm_config.model_config.get_vocab_size(),
                max_model_len=vllm_config.model_config.max_model_len - 1,  # vLLM samples a token, which needs room
                scores_support_ids=vllm_config.use_v2_model_runner,
            )
        except BaseException:
            self._end()
            raise
        self._watch = asyncio.run_coroutine_threadsafe(self._watch_engine(), self._loop)

    def submit(self, job: ScoreJob) -> None:
        """Hand a job's sequences to vLLM; its answer, or its error, arrives in `job.done`."""
        self._loop.call_soon_threadsafe(self._begin, job)

    def backlog_s(self) -> float:
        """Estimate of the time that the accepted work takes, seconds; 0 before anything was measured."""
        return self._speed.backlog_s()

    def close(self) -> None:
        """Abort what is under way, end vLLM's processes, then the loop and its thread."""
        self._on_loop(self._stop())
        self._end()

    def _on_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end(self) -> None:
        # First, or they would report the end of the processes they listen to as a failure.
        self._on_loop(_cancel_others())
        if self._engine is not None:
            self._engine.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._closed = True
        self._watch.cancel()
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _begin(self, job: ScoreJob) -> None:
        if self._closed:
            job.refuse(shutting_down())
            return
        task = self._loop.create_task(self._score(job))
        self._tasks[job] = task
        task.add_done_callback(lambda _: self._forget(job))
        # A caller that goes away ends `done`; cancelling the task aborts its requests in vLLM.
        job.done.add_done_callback(lambda _: self._loop.call_soon_threadsafe(task.cancel))
        self._speed.begin(_num_tokens(job))
        self._metrics.queued_sequences.inc(len(job.sequences))

    def _forget(self, job: ScoreJob) -> None:
        del self._tasks[job]
        self._speed.end(_num_tokens(job))
        self._metrics.queued_sequences.dec(len(job.sequences))
        if not job.done.done():  # cancelled by `close`
            job.refuse(shutting_down())

    async def _score(self, job: ScoreJob) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for item in job.items():
                    group.create_task(self._score_sequence(item))
            job.answer(self.info)
        except ExceptionGroup as errors:
            error = errors.exceptions[0]
            if isinstance(error, EngineDeadError):
                self._abandon(error)
                return
            if not isinstance(error, DistillServeError):
                logger.error("scoring failed", exc_info=error, extra={"request_id": job.request_id})
            job.refuse(error)

    async def _score_sequence(self, item: ScoreItem) -> None:
        prompt, parameters = tokens_input(item.sequence.token_ids), sampling_params(item)
        async with aclosing(self._engine.generate(prompt, parameters, uuid.uuid4().hex)) as outputs:
            async for output in outputs:
                if output.finished:
                    write_rows(item, output, self.info.padded_vocab_size)
                    return
        raise RuntimeError("vLLM ended a request without an answer")

    async def _watch_engine(self) -> None:
        """Notice that vLLM's processes died although nobody asked them anything."""
        while not self._engine.errored:
            await asyncio.sleep(_POLL_S)
        self._abandon(EngineDeadError())

    def _abandon(self, error: Exception) -> None:
        """Nothing will be scored any more: whoever waits is told at once."""
        if self._closed:
            return
        self._closed = True
        self._on_failure(error)
        for job in list(self._tasks):
            job.refuse(engine_failed(error))


class _Speed:
    """Tokens that wait, and how fast they are scored as long as there is work."""

    def __init__(self) -> None:
        self._waiting, self._scored, self._busy_since, self._tokens_per_s = 0, 0, 0.0, 0.0

    def begin(self, tokens: int) -> None:
        if self._waiting == 0:
            self._scored, self._busy_since = 0, time.monotonic()
        self._waiting += tokens

    def end(self, tokens: int) -> None:
        self._waiting -= tokens
        self._scored += tokens
        self._tokens_per_s = self._scored / max(time.monotonic() - self._busy_since, 1e-9)

    def backlog_s(self) -> float:
        return self._waiting / self._tokens_per_s if self._tokens_per_s else 0.0


def _num_tokens(job: ScoreJob) -> int:
    return sum(len(s.token_ids) for s in job.sequences)


async def _cancel_others() -> None:
    """Cancel the tasks that are left on this loop: vLLM's, which wait for messages of its processes."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _started(config: TeacherConfig) -> AsyncLLM:
    return start_vllm(config)


def start_vllm(config: TeacherConfig) -> AsyncLLM:
    """vLLM with the model loaded; the calling thread's event loop must run and be the one that uses it.

    Raises:
        StartupError: an option of vLLM's is unknown, or it cannot start; its own log says more.
    """
    check_socket_folder()
    arguments = engine_arguments(config)
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except ValidationError as error:
        raise StartupError(f"vLLM refuses teacher.model = {config.model!r} or its options: {_reason(error)}") from error
    except Exception as error:  # anything up to CUDA's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StartupError(f"vLLM cannot start with teacher.model = {config.model!r}: {reason}") from error


def _reason(error: ValidationError) -> str:
    return " ".join(error.errors()[0]["msg"].removeprefix("Value error, ").split())


def engine_arguments(config: TeacherConfig) -> dict[str, Any]:
    """Fields of AsyncEngineArgs; what the user gives in `engine_args` wins.

    Raises:
        StartupError: `engine_args` names a field that vLLM does not have.
    """
    fields = AsyncEngineArgs.__dataclass_fields__
    for name in config.engine_args:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise StartupError(f"teacher.engine_args.{name} is no field of vLLM's AsyncEngineArgs{hint}")
    arguments: dict[str, Any] = {
        "model": config.model,
        "load_format": "safetensors",  # vLLM's own "auto" falls back to pickled weights
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization or ALONE_UTILIZATION,
        "kv_cache_memory_bytes": kv_cache_bytes(config.kv_cache_gib),
        "max_logprobs": -1,  # all of the vocabulary; what a request may ask is checked before it gets here
        "enable_prefix_caching": False,  # never read for prompt logprobs
        "disable_log_stats": True,
        "enforce_eager": not torch.cuda.is_available(),  # compiling for CPU costs minutes and gains nothing here
        "shutdown_timeout": _DRAIN_S,
    }
    if config.max_model_len is not None:
        # Room for the token that vLLM samples.
        arguments["max_model_len"] = min(config.max_model_len + 1, longest_sequence(config))
    theirs = config.engine_args.get("hf_overrides", {})
    head = float32_head(config.float32_head, config.dtype, is_quantised=_is_quantised(config))
    if head and isinstance(theirs, dict):
        arguments["hf_overrides"] = head | theirs
        return arguments | {name: v for name, v in config.engine_args.items() if name != "hf_overrides"}
    return arguments | config.engine_args


def _is_quantised(config: TeacherConfig) -> bool:
    """Whether the head may be, which vLLM then computes in no other dtype."""
    shape = read_shape(config.model or "")
    return "quantization" in config.engine_args or shape is None or shape.stored_bytes is not None


def sampling_params(item: ScoreItem) -> SamplingParams:
    """vLLM's parameters: the top-k of every position of the prompt, and the one new token that it cannot leave out."""
    job, sequence = item.job, item.sequence
    parameters: dict[str, Any] = {}
    if job.support_width:
        parameters["prompt_logprob_token_ids"] = np.asarray(sequence.support_ids, np.int32)
        parameters["prompt_logprob_start"] = sequence.prompt_length - 1  # the row that predicts the next token
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=job.top_k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **parameters,
    )


def write_rows(item: ScoreItem, output: RequestOutput, vocab_size: int) -> None:
    """Read the rows of a completion out of vLLM's answer.

    Position t of vLLM's prompt logprobs describes token t given those before it: first that token itself, then the
    top-k, which may repeat it. The first position is empty.

    Raises:
        RequestError: vLLM was told to end and aborted the request.
        DistillServeError: vLLM's logprobs are not finite, or not as many as there must be.
    """
    if output.outputs and output.outputs[0].finish_reason == "abort":
        raise shutting_down()
    sequence, columns, rows, top_k = item.sequence, item.job.columns, item.rows, item.job.top_k
    flat, shape = output.prompt_logprobs, (sequence.num_rows, top_k + 1)
    if not isinstance(flat, FlatLogprobs) or len(flat) != len(sequence.token_ids):
        raise DistillServeError("vLLM did not report the logprobs of every token of the sequence")
    part = slice(flat.start_indices[sequence.prompt_length], flat.end_indices[-1])
    ids = np.asarray(flat.token_ids[part], np.int32).reshape(shape)
    logprobs = np.asarray(flat.logprobs[part], np.float32).reshape(shape)
    if not np.isfinite(logprobs[:, 1]).all():
        raise DistillServeError("the teacher's logits are not finite; its weights or its dtype are not usable")
    order = np.lexsort((ids[:, 1:], -logprobs[:, 1:]), axis=-1)  # equal logprobs by rising id
    columns.token_ids[rows] = ids[:, 0]
    columns.token_logprobs[rows] = logprobs[:, 0]
    columns.topk_ids[rows] = np.take_along_axis(ids[:, 1:], order, axis=1)
    columns.topk_logprobs[rows] = topk = np.take_along_axis(logprobs[:, 1:], order, axis=1)
    columns.tail_logprobs[rows] = log_mass_left(topk) if top_k < vocab_size else -np.inf
    columns.entropies[rows] = np.nan
    if columns.support_logprobs is not None:
        _write_support(item, output)


def _write_support(item: ScoreItem, output: RequestOutput) -> None:
    sequence, columns = item.sequence, item.job.columns
    assert columns.support_logprobs is not None and columns.support_tail_logprobs is not None
    logprobs = (
        output.prompt_token_id_logprobs if item.job.support_width else np.empty((sequence.num_rows, 0), np.float32)
    )
    if logprobs is None or logprobs.shape != (sequence.num_rows, item.job.support_width):
        raise DistillServeError("vLLM did not report the logprobs of support_ids at every row")
    columns.support_logprobs[item.rows] = logprobs
    # A token that is named twice has its mass once.
    distinct = [np.unique(ids, return_index=True)[1] for ids in sequence.support_ids or []]
    tails = [log_mass_left(row[index]) for row, index in zip(logprobs, distinct, strict=True)]
    columns.support_tail_logprobs[item.rows] = tails
