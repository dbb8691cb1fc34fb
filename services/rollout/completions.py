"""`POST /v1/rollouts` and its kin, served inside vLLM's own process straight from its engine client.

    consumes   a RolloutRequest
    produces   a stream with one frame per completion, in the order in which they finish
    waits for  the gate (services/rollout/admission.py), then the engine
    unblocked  by the end of a weight push

A client that disconnects, or does not read, takes its unfinished completions with it: cancelling
`AsyncLLM.generate` aborts the request in the engine.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

from services.http.request_body import read_body
from services.rollout.body import read_request
from services.rollout.state import RolloutState
from services.wire.frames import END_OF_STREAM, FRAMES_MEDIA_TYPE, HEARTBEAT, HEARTBEAT_S
from services.wire.message import PROTOCOL_VERSION
from services.wire.rollout import (
    RolloutCompletion,
    RolloutInfo,
    RolloutRequest,
    RolloutSampling,
    VersionSpan,
    encode_completion,
    encode_stream_error,
)

# Nobody knows how long completions take; a client that is sent away for so long waits little longer than it must.
_RETRY_AFTER_S = 5.0


def engine_of(request: Request) -> Any:
    """vLLM's AsyncLLM; it is there before the server accepts connections."""
    return request.app.state.engine_client


async def get_info(request: Request, state: RolloutState) -> Response:
    """`GET /v1/rollouts/info`."""
    engine, settings = engine_of(request), state.settings
    model = engine.model_config
    info = RolloutInfo(
        protocol=PROTOCOL_VERSION,
        model=settings.model,
        boot_id=state.boot_id,
        policy_version=state.policy_version,
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        max_logprobs=settings.max_logprobs,
        world_size=engine.vllm_config.parallel_config.world_size_across_dp,
        weight_transfer_backend=settings.backend,
        gpu_uuids=list(settings.gpu_uuids),
        max_completions_per_request=settings.max_completions_per_request,
    )
    return JSONResponse(info.model_dump())


async def create_rollouts(request: Request, state: RolloutState) -> Response:
    """`POST /v1/rollouts`; its place is taken before the body is read and kept until the answer is sent.

    Raises:
        RequestError: all places are taken, the body is late, no RolloutRequest or over a limit of this server, or it is of a
            run that does not hold it.
    """
    engine, settings = engine_of(request), state.settings
    with ExitStack() as stack:
        stack.enter_context(state.places.take(lambda: _RETRY_AFTER_S))
        body = await read_body(request, settings.transfer_timeout_s)
        model = engine.model_config
        rollouts = await read_request(body, settings, model.max_model_len, model.get_vocab_size())
        if rollouts.run is not None:
            state.holder.check(rollouts.run)
        frames = stream_completions(engine, rollouts, state)
        return FrameStream(frames, on_end=stack.pop_all().close)


async def stream_completions(engine: Any, request: RolloutRequest, state: RolloutState) -> AsyncGenerator[bytes]:
    """Frames of all completions as they finish, then the end mark; an error frame when one fails; heartbeats in between."""
    batch = uuid.uuid4().hex[:12]
    finished: asyncio.Queue[asyncio.Task[RolloutCompletion]] = asyncio.Queue()
    tasks = [
        asyncio.create_task(_complete(engine, request, prompt, sample, f"{batch}-{prompt}-{sample}", state))
        for prompt in range(len(request.prompts))
        for sample in range(request.samples_per_prompt)
    ]
    for task in tasks:
        task.add_done_callback(finished.put_nowait)
    try:
        num_sent = 0
        while num_sent < len(tasks):
            try:
                task = await asyncio.wait_for(finished.get(), HEARTBEAT_S)
            except TimeoutError:
                yield HEARTBEAT
                continue
            yield encode_completion(task.result())
            num_sent += 1
        yield END_OF_STREAM
    except Exception as error:  # the status line is long gone: tell the reader inside the stream
        yield encode_stream_error(f"{type(error).__name__}: {error}")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class FrameStream(Response):
    """An answer of frames that ends with its connection (services/http/bounded_connection.py bounds how long a caller may not
    read): what nobody takes any more is not computed.

    Args:
        on_end: called when nothing more is sent.
    """

    def __init__(self, frames: AsyncGenerator[bytes], on_end: Callable[[], object]) -> None:
        super().__init__(media_type=FRAMES_MEDIA_TYPE)
        del self.headers["content-length"]
        self._frames, self._on_end = frames, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            gone.cancel()
            await asyncio.wait((sending, gone))
            self._on_end()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._frames) as frames:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _complete(
    engine: Any, request: RolloutRequest, prompt_index: int, sample_index: int, request_id: str, state: RolloutState
) -> RolloutCompletion:
    params = sampling_params(request.sampling, request.student_top_k, sample_index)
    prompt = tokens_input(request.prompts[prompt_index])
    async with state.admission.admitted():
        if request.run is not None:
            state.holder.check(request.run)  # the server may have changed hands while the gate was shut
        async with aclosing(engine.generate(prompt, params, request_id)) as outputs:
            async for output in outputs:
                if output.finished:
                    return to_completion(output.outputs[0], prompt_index, sample_index, request.student_top_k)
    raise RuntimeError(f"the engine ended request {request_id} without an answer")


def sampling_params(sampling: RolloutSampling, student_top_k: int, sample_index: int) -> SamplingParams:
    """vLLM's parameters: no text, one final output, logprobs of the sampled token and the top-k."""
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=None if sampling.seed is None else sampling.seed + sample_index,
        logprobs=student_top_k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def to_completion(output: CompletionOutput, prompt_index: int, sample_index: int, top_k: int) -> RolloutCompletion:
    """vLLM's flat logprobs, per position the sampled token followed by the top-k, as arrays."""
    flat = output.logprobs
    assert isinstance(flat, FlatLogprobs)
    length, width = len(output.token_ids), top_k + 1
    ids = np.asarray(flat.token_ids, dtype=np.int32).reshape(length, width)
    logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(length, width)
    return RolloutCompletion(
        prompt_index=prompt_index,
        sample_index=sample_index,
        token_ids=np.asarray(output.token_ids, dtype=np.int32),
        rollout_logprobs=logprobs[:, 0],
        finish_reason=output.finish_reason if output.finish_reason in ("stop", "length") else "abort",
        policy_versions=[VersionSpan(s.version, s.start, s.end) for s in output.weight_versions or []],
        student_topk_ids=ids[:, 1:] if top_k else None,
        student_topk_logprobs=logprobs[:, 1:] if top_k else None,
    )
