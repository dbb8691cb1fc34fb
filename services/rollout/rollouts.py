"""`POST /v1/rollouts` and its kin, served inside vLLM's own process straight from its engine client.

    consumes   a RolloutRequest
    produces   a stream with one frame per completion, in the order in which they finish
    waits for  the gate (services/rollout/admission.py), then the engine
    unblocked  by the end of a weight push

A client that disconnects takes its unfinished completions with it: cancelling `AsyncLLM.generate` aborts
the request in the engine.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

from services.errors import RequestError, describe_validation_error
from services.rollout.admission import Admission
from services.rollout.settings import RolloutSettings
from services.rollout.state import RolloutState
from services.schemas import (
    PROTOCOL_VERSION,
    RolloutCompletion,
    RolloutInfo,
    RolloutRequest,
    RolloutSampling,
    VersionSpan,
)
from services.wire import END_OF_STREAM, FRAMES_MEDIA_TYPE, encode_completion, encode_stream_error


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
    """`POST /v1/rollouts`.

    Raises:
        RequestError: the body is no RolloutRequest, is over a limit of this server, or is of a run that does not hold it.
    """
    try:
        rollouts = RolloutRequest.model_validate_json(await request.body())
    except ValidationError as error:
        field, message = describe_validation_error(error)[0]
        raise RequestError(422, "Invalid request", f"{field}: {message}", field=field) from error
    if rollouts.run is not None:
        state.holder.check(rollouts.run)
    engine = engine_of(request)
    check_limits(rollouts, state.settings, engine.model_config.max_model_len, engine.model_config.get_vocab_size())
    return StreamingResponse(stream_completions(engine, rollouts, state.admission), media_type=FRAMES_MEDIA_TYPE)


def check_limits(request: RolloutRequest, settings: RolloutSettings, max_model_len: int, vocab_size: int) -> None:
    """Refuse what the engine would refuse later, or not survive.

    Raises:
        RequestError: names the field, its value and the limit.
    """
    total = len(request.prompts) * request.samples_per_prompt
    if total > settings.max_completions_per_request:
        raise RequestError(
            413,
            "Too many completions",
            f"prompts x samples_per_prompt = {total} is above max_completions_per_request = "
            f"{settings.max_completions_per_request}; send several requests",
            field="prompts",
        )
    if request.student_top_k > settings.max_logprobs:
        raise RequestError(
            422,
            "Top-k too large",
            f"student_top_k = {request.student_top_k} is above rollout.max_logprobs = {settings.max_logprobs}",
            field="student_top_k",
        )
    for index, prompt in enumerate(request.prompts):
        length = len(prompt) + request.sampling.max_new_tokens
        if length > max_model_len:
            raise RequestError(
                422,
                "Prompt too long",
                f"prompts.{index} has {len(prompt)} tokens; with max_new_tokens = {request.sampling.max_new_tokens} "
                f"that is above max_model_len = {max_model_len}",
                field=f"prompts.{index}",
            )
        if max(prompt) >= vocab_size:
            raise RequestError(
                422,
                "Token id out of range",
                f"prompts.{index} holds token id {max(prompt)}, the model's vocabulary has {vocab_size}",
                field=f"prompts.{index}",
            )


async def stream_completions(engine: Any, request: RolloutRequest, admission: Admission) -> AsyncIterator[bytes]:
    """Frames of all completions as they finish, then the end mark; an error frame when one fails."""
    batch = uuid.uuid4().hex[:12]
    tasks = [
        asyncio.create_task(_complete(engine, request, prompt, sample, f"{batch}-{prompt}-{sample}", admission))
        for prompt in range(len(request.prompts))
        for sample in range(request.samples_per_prompt)
    ]
    try:
        for finished in asyncio.as_completed(tasks):
            yield encode_completion(await finished)
        yield END_OF_STREAM
    except Exception as error:  # the status line is long gone: tell the reader inside the stream
        yield encode_stream_error(f"{type(error).__name__}: {error}")
    finally:
        for task in tasks:
            task.cancel()


async def _complete(
    engine: Any, request: RolloutRequest, prompt_index: int, sample_index: int, request_id: str, admission: Admission
) -> RolloutCompletion:
    params = sampling_params(request.sampling, request.student_top_k, sample_index)
    prompt = tokens_input(request.prompts[prompt_index])
    async with admission.admitted(), aclosing(engine.generate(prompt, params, request_id)) as outputs:
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
