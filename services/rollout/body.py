"""The body of a request for rollouts, from bytes to a RolloutRequest, read beside the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from services.errors import RequestError
from services.http.request_body import parse_body
from services.rollout.settings import RolloutSettings
from services.wire.rollout import MAX_IDS_PER_REQUEST, RolloutRequest

# Read in less time than it takes to wake the thread that reads the others.
_SMALL_BODY_BYTES = 16 << 10
# Lists, objects, commas and colons of a body besides its prompts and their ids.
_OTHER_MARKS = 64
# One body after the other: the memory of reading one is many times its size.
_reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout-requests")


async def read_request(body: bytes, settings: RolloutSettings, max_model_len: int, vocab_size: int) -> RolloutRequest:
    """The request that a body spells, within the limits of this server.

    Raises:
        RequestError: it spells none, or one over a limit; names the field.
    """
    arguments = (body, settings, max_model_len, vocab_size)
    if len(body) <= _SMALL_BODY_BYTES:
        return parse_request(*arguments)
    return await asyncio.get_running_loop().run_in_executor(_reader, parse_request, *arguments)


def parse_request(body: bytes, settings: RolloutSettings, max_model_len: int, vocab_size: int) -> RolloutRequest:
    """As `read_request`, in the calling thread; the largest bodies take a tenth of a second."""
    _check_size(body, settings)
    request = parse_body(body, RolloutRequest)
    _check_limits(request, settings, max_model_len, vocab_size)
    return request


def _check_size(body: bytes, settings: RolloutSettings) -> None:
    """Refuse what would take long to read: to count is a hundred times as fast, and no other thread runs while JSON is read."""
    lists = body.count(b"[") + body.count(b"{")
    ids, names = body.count(b","), body.count(b":")
    if lists > settings.max_completions_per_request + _OTHER_MARKS or names > _OTHER_MARKS:
        raise _too_large(f"the body holds {lists} lists and objects and {names} named values", "prompts")
    if ids > MAX_IDS_PER_REQUEST + _OTHER_MARKS:
        raise _too_large(f"the body holds {ids} token ids, at most {MAX_IDS_PER_REQUEST} are read", "prompts")


def _too_large(detail: str, field: str) -> RequestError:
    return RequestError(413, "Over a limit", f"{detail}; send several requests", field=field)


def _check_limits(request: RolloutRequest, settings: RolloutSettings, max_model_len: int, vocab_size: int) -> None:
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
