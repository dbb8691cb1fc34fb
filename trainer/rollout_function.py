"""A rollout function of the user's own in the place of one request for completions: several turns, tools, an environment.

consumes   the prompts of a step, and a client of the rollout servers
produces   PromptGroup, as trainer/rollouts.py does: completions with the logprobs of the policy that sampled them
waits for  the function, for at most `timeout_s`
"""

import asyncio
import inspect
import json
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from services.clients import RolloutClient
from services.errors import DistillServeError, UserCodeError
from services.wire.rollout import RolloutCompletion, RolloutSampling, VersionSpan
from trainer.data.prompts import Prompt
from trainer.groups import PromptGroup, Rollout
from trainer.rollouts import reason_to_set_aside
from trainer.weights.policy_versions import PolicyVersions

_REQUIRED = ("completion_ids", "logprobs")
_KNOWN = (*_REQUIRED, "prompt_ids", "completion_mask", "truncated", "policy_versions")


class StudentClient:
    """What a rollout function asks the student with; which weights answer is noted.

    Attributes:
        tokenizer: the student's.
        oldest: version and label of the oldest weights that have answered; None before the first answer.
    """

    def __init__(
        self,
        client: RolloutClient,
        versions: PolicyVersions,
        sampling: RolloutSampling,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._client, self._versions, self._sampling, self.tokenizer = client, versions, sampling, tokenizer
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self.oldest: tuple[int, str] | None = None

    async def generate(
        self, prompts: Sequence[Sequence[int]], sampling: RolloutSampling | None = None, samples_per_prompt: int = 1
    ) -> list[RolloutCompletion]:
        """Complete prompts, token ids each; answers in their order, the samples of one prompt after another.

        Args:
            sampling: default: that of the run. Another temperature gives other logprobs than those that are trained.

        Raises:
            PeerError: a server failed, or sampled under weights that this run has not pushed.
        """
        ids = [list(prompt) for prompt in prompts]
        completions = await self._client.generate(
            ids, sampling or self._sampling, samples_per_prompt, waits_for_weights=True
        )
        for completion in completions:
            versions, spans = self._versions.of(completion), completion.policy_versions
            answered = [(version, span.policy_version) for version, span in zip(versions, spans, strict=True)]
            self.oldest = min([*answered, *([] if self.oldest is None else [self.oldest])])
        return completions

    def generate_sync(
        self, prompts: Sequence[Sequence[int]], sampling: RolloutSampling | None = None, samples_per_prompt: int = 1
    ) -> list[RolloutCompletion]:
        """As `generate`, for functions that are not async."""
        if threading.get_ident() == self._loop_thread:
            raise RuntimeError(
                "generate_sync would wait for itself in an async function; use `await client.generate(...)`"
            )
        asked = self.generate(prompts, sampling, samples_per_prompt)
        return asyncio.run_coroutine_threadsafe(asked, self._loop).result()


RolloutAnswer: TypeAlias = Mapping[str, Sequence[Any]]
"""What a rollout function returns, each field with an entry for every prompt it was given:

completion_ids   token ids after the prompt, at least one
logprobs         of each of them under the policy that sampled it; anything where the mask is 0
completion_mask  1: sampled by the student, and trained; 0: of a tool or an environment. Default: all 1
prompt_ids       in the place of the prompt's own token ids
truncated        whether the completion was cut off. Default: whether its last token ends no completion
policy_versions  the label under which it was sampled. Default: the oldest that answered `client`
others           JSON; columns for reward functions
"""
RolloutFunction: TypeAlias = Callable[
    [list[Prompt], RolloutSampling, StudentClient], RolloutAnswer | Awaitable[RolloutAnswer]
]
"""Prompts, of which each comes `samples_per_prompt` times in a row, the run's sampling and a client to an answer. A function
that is not async runs in a thread of its own."""


@dataclass(frozen=True)
class OwnRollouts:
    """A rollout function and what its answers are checked against.

    Attributes:
        timeout_s: how long one call may take.
        vocab_size: of the student.
        max_model_len: tokens of the longest prompt with completion that servers take.
        end_token_ids: what ends a completion of the student.
    """

    function: RolloutFunction
    timeout_s: float
    client: RolloutClient
    versions: PolicyVersions
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_model_len: int
    end_token_ids: Sequence[int]

    async def generate_groups(
        self,
        prompts: list[Prompt],
        sampling: RolloutSampling,
        samples_per_prompt: int,
        on_group: Callable[[PromptGroup], None] = lambda group: None,
    ) -> list[PromptGroup]:
        """As trainer.rollouts.generate_groups.

        Raises:
            UserCodeError: the function failed, took too long, or returned what cannot be trained on.
            PeerError: a server failed, or sampled under a version that is none of the run's.
        """
        asked = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        client = StudentClient(self.client, self.versions, sampling, self.tokenizer)
        try:
            async with asyncio.timeout(self.timeout_s) as deadline:
                answer = await _call(self.function, asked, sampling, client)
        except DistillServeError:
            raise
        except Exception as error:
            if deadline.expired():
                raise self._failed(f"has not returned after {self.timeout_s:g} s (rollout_timeout_s)") from error
            raise self._failed(f"raised {type(error).__name__}: {' '.join(str(error).split())}") from error
        rollouts = self._read(answer, asked, samples_per_prompt, client)
        groups = [
            PromptGroup(place, prompt, rollouts[place * samples_per_prompt : (place + 1) * samples_per_prompt])
            for place, prompt in enumerate(prompts)
        ]
        for group in groups:
            on_group(group)
        return groups

    def _read(self, answer: Any, asked: list[Prompt], samples: int, client: StudentClient) -> list[Rollout]:
        if not isinstance(answer, Mapping):
            raise self._failed(f"returned a {type(answer).__name__}; it must return a dict with {', '.join(_REQUIRED)}")
        if missing := [name for name in _REQUIRED if name not in answer]:
            raise self._failed(f"returned no {missing[0]}; it must return a dict with {', '.join(_REQUIRED)}")
        for name, values in answer.items():
            length = len(values) if hasattr(values, "__len__") and not isinstance(values, str | Mapping) else None
            if length != len(asked):
                found = f"a {type(values).__name__}" if length is None else f"{length} entries"
                raise self._failed(
                    f"returned {found} as {name}; it must be a list with one entry for each of {len(asked)} prompts"
                )
        if client.oldest is None and "policy_versions" not in answer:
            raise self._failed(
                "never asked the client that it is given, so nothing says which weights have sampled; ask that one, or return "
                "policy_versions"
            )
        return [self._rollout(answer, index, samples, prompt, client) for index, prompt in enumerate(asked)]

    def _rollout(
        self, answer: RolloutAnswer, index: int, samples: int, prompt: Prompt, client: StudentClient
    ) -> Rollout:
        values = {name: column[index] for name, column in answer.items()}
        try:
            prompt_ids = self._ids("prompt_ids", values.get("prompt_ids", prompt.token_ids))
            ids = self._ids("completion_ids", values["completion_ids"])
            if len(prompt_ids) + len(ids) > self.max_model_len:
                raise ValueError(
                    f"prompt and completion have {len(prompt_ids) + len(ids)} tokens, more than the {self.max_model_len} that the "
                    "servers take"
                )
            mask = _mask(values.get("completion_mask"), len(ids))
            logprobs = _logprobs(values["logprobs"], len(ids), mask)
            truncated = values.get("truncated", int(ids[-1]) not in self.end_token_ids)
            if not isinstance(truncated, bool | np.bool_):
                raise ValueError(f"truncated is {truncated!r}; it must be True or False")
            label = values.get("policy_versions", client.oldest[1] if client.oldest else "")
            if not isinstance(label, str):
                raise ValueError(f"policy_versions is {label!r}; it must be a label, as a completion's spans have them")
            others = {name: _json(name, value) for name, value in values.items() if name not in _KNOWN}
        except (ValueError, TypeError, OverflowError) as error:
            raise self._failed(f"returned a bad sample {index} (row {prompt.row}): {error}") from error
        where, spans = divmod(index, samples), [VersionSpan(label, 0, len(ids))]
        completion = RolloutCompletion(*where, ids, logprobs, "length" if truncated else "stop", spans)
        if reason := reason_to_set_aside(completion):
            raise self._failed(f"returned a bad sample {index} (row {prompt.row}): it {reason}")
        version = self.versions.oldest([completion])
        prompt = replace(prompt, token_ids=prompt_ids.tolist(), columns={**prompt.columns, **others})
        return Rollout(prompt, completion, version, None if mask.all() else mask)

    def _ids(self, name: str, values: Any) -> np.ndarray:
        """[T] int32."""
        ids = np.asarray(values)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) == 0:
            raise ValueError(f"{name} must be a list of token ids, at least one")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            wrong = next(int(token) for token in ids if not 0 <= token < self.vocab_size)
            raise ValueError(
                f"{name} has the id {wrong}, which is outside the student's vocabulary of {self.vocab_size}"
            )
        return ids.astype(np.int32)

    def _failed(self, how: str) -> UserCodeError:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return UserCodeError(f"the rollout function {name} {how}")


def _json(name: str, value: Any) -> Any:
    """A value for other processes, with numpy's numbers and arrays as Python's."""
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    try:
        json.dumps(plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from error
    return plain


def _mask(values: Any, length: int) -> np.ndarray:
    """[T] bool."""
    if values is None:
        return np.ones(length, np.bool_)
    mask = np.asarray(values)
    if mask.shape != (length,):
        raise ValueError(f"completion_mask has {mask.size} entries for {length} tokens")
    if mask.dtype.kind not in "biu" or not np.isin(mask, (0, 1)).all():
        raise ValueError("completion_mask must hold 0 and 1 alone")
    return mask.astype(np.bool_)


def _logprobs(values: Any, length: int, mask: np.ndarray) -> np.ndarray:
    """[T] float32, 0 where the mask is."""
    if len(values) != length:
        raise ValueError(f"{len(values)} logprobs for {length} tokens")
    # What a tool has written has none; a None there is as good as any number.
    logprobs = np.asarray([value if counts else 0.0 for value, counts in zip(values, mask, strict=True)])
    if logprobs.ndim != 1 or (length and logprobs.dtype.kind not in "fiu"):
        raise ValueError("logprobs must be a list of numbers")
    return logprobs.astype(np.float32)


async def _call(function: Any, *arguments: Any) -> Any:
    """What a function returns, async or not.

    Raises:
        RuntimeError: it wanted to end the program, which would end the event loop alone.
    """
    try:
        return await _returned(function, *arguments)
    except (SystemExit, KeyboardInterrupt, StopIteration) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


async def _returned(function: Any, *arguments: Any) -> Any:
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        return await function(*arguments)
    returned = await _in_thread(function, *arguments)
    return await returned if inspect.isawaitable(returned) else returned


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Unlike asyncio.to_thread, in one that nobody waits for when the time is over: it may hang for ever."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():  # given up
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except BaseException as raised:
            error = raised
            if not isinstance(raised, Exception) or isinstance(raised, StopIteration):  # none of a future's
                error = RuntimeError(f"{type(raised).__name__}: {raised}")
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the run is over
            return

    threading.Thread(target=work, name="rollout-function", daemon=True).start()
    return await done
